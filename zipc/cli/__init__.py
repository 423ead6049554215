"""The command line: one module per verb, each a thin coat over one library function."""
