"""One file per runtime; each gives a `Runner` that times one inference."""
