"""Run the command line as `python -m zipc`."""

from __future__ import annotations

from zipc.cli.app import main

if __name__ == "__main__":
    main()
