"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from zipc.cli.app import main

Run = Callable[..., tuple[int, str, str]]


def command_line(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs `zipc` with arguments: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    return run
