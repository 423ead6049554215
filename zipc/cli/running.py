"""Run the body of a verb: progress, errors, signals, exit codes, and what goes to stdout."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import typer
from rich.console import Console

from zipc.cli.progress import open_progress
from zipc.core.errors import TargetUnreachable, ZipcError
from zipc.core.types import Progress

Format = Literal["table", "json"]
BUG_EXIT_CODE = 70  # sysexits' EX_SOFTWARE: a crash must not read as "regressed", which is 1
PIPED_WIDTH = 120  # columns, where there is no terminal to ask
INTERRUPTED = "interrupted; finished stages are kept, run the same command again to resume"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verb has to say: as a document for programs, as text for people."""

    document: Any
    show: Callable[[Console], None]
    exit_code: int = 0


def run_verb(body: Callable[[Progress], Outcome], *, output: Format) -> None:
    """Run `body`, print its outcome and leave with its exit code.

    Whatever `body` and the libraries under it print goes to stderr, so that stdout carries the
    outcome alone. A `ZipcError` becomes its message; any other exception keeps its traceback.

    Raises:
        typer.Exit: always, with the exit code.
    """
    as_json = output == "json"
    try:
        with _sigterm_raises(), contextlib.redirect_stdout(sys.stderr), open_progress() as progress:
            outcome = body(progress)
    except ZipcError as error:
        _say_error(error, as_json=as_json)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as stop:
        code = 143 if isinstance(stop, Terminated) else 130
        print(INTERRUPTED, file=sys.stderr)
        if as_json:
            print_json(error_document("Interrupted", INTERRUPTED, exit_code=code))
        raise typer.Exit(code) from None
    except Exception as bug:
        traceback.print_exc()
        if as_json:
            print_json(error_document(type(bug).__name__, str(bug), exit_code=BUG_EXIT_CODE))
        raise typer.Exit(BUG_EXIT_CODE) from None
    if as_json:
        print_json(outcome.document)
    else:
        width = None if sys.stdout.isatty() else PIPED_WIDTH
        outcome.show(Console(highlight=False, width=width))
    raise typer.Exit(outcome.exit_code)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: unwind as for Ctrl-C, so that temporary files go."""


def error_document(kind: str, message: str, *, exit_code: int, **details: Any) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "exit_code": exit_code, **details}}


def print_json(document: Any) -> None:
    """Print one JSON document; a value JSON has no word for is a bug, not a NaN."""
    print(json.dumps(document, indent=2, allow_nan=False))


def _say_error(error: ZipcError, *, as_json: bool) -> None:
    if not as_json:
        print(f"zipc: {error}", file=sys.stderr)
        return
    details: dict[str, Any] = {}
    if isinstance(error, TargetUnreachable):
        details["best_speedup"] = error.best_speedup
    document = error_document(
        type(error).__name__, str(error), exit_code=error.exit_code, **details
    )
    print_json(document)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
