"""Run the body of a verb: progress, errors, signals, exit codes, and what goes to stdout."""

from __future__ import annotations

import contextlib
import io
import json
import os
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
from zipc.core.errors import TargetUnreachable, UsageError, ZipcError, first_line
from zipc.core.types import Progress

Format = Literal["table", "json"]
BUG_EXIT_CODE = 70  # sysexits' EX_SOFTWARE: a crash must not read as "regressed", which is 1
PIPED_WIDTH = 120  # columns, where there is no terminal to ask
RESUMABLE = "interrupted; finished stages are kept, run the same command again to resume"
UNCHANGED = "interrupted; nothing was changed"
TOO_LARGE = (  # what torch and numpy say of a size, in errors that are no MemoryError
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "Storage size calculation overflowed",
    "Maximum allowed dimension exceeded",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verb has to say: as a document for programs, as text for people."""

    document: Any
    show: Callable[[Console], None]
    exit_code: int = 0


def run_verb(body: Callable[[Progress], Outcome], *, output: Format, resumes: bool = False) -> None:
    """Run `body`, print its outcome and leave with its exit code.

    Whatever `body` and the libraries under it print goes to stderr, so that stdout carries the
    outcome alone. A `ZipcError` becomes its message, and so does a lack of memory; any other
    exception keeps its traceback. `resumes`: what an interrupted run had finished is kept.

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
        told = RESUMABLE if resumes else UNCHANGED
        print(told, file=sys.stderr)
        if as_json:
            print_json(error_document("Interrupted", told, exit_code=code))
        raise typer.Exit(code) from None
    except Exception as bug:
        if _lacks_memory(bug):
            _say_error(_memory_error(bug), as_json=as_json)
            raise typer.Exit(ZipcError.exit_code) from None
        traceback.print_exc()
        if as_json:
            print_json(error_document(type(bug).__name__, str(bug), exit_code=BUG_EXIT_CODE))
        raise typer.Exit(BUG_EXIT_CODE) from None
    printed = _print(_document(outcome.document) if as_json else _drawn(outcome.show))
    raise typer.Exit(outcome.exit_code if printed else ZipcError.exit_code)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: unwind as for Ctrl-C, so that temporary files go."""


def error_document(kind: str, message: str, *, exit_code: int, **details: Any) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "exit_code": exit_code, **details}}


def error_details(error: ZipcError) -> dict[str, Any]:
    """The document of a deliberate error."""
    details: dict[str, Any] = {}
    if isinstance(error, TargetUnreachable):
        details["best_speedup"] = error.best_speedup
    return error_document(type(error).__name__, str(error), exit_code=error.exit_code, **details)


def print_json(document: Any) -> None:
    """Print one JSON document; a value JSON has no word for is a bug, not a NaN."""
    _print(_document(document))


def _lacks_memory(error: Exception) -> bool:
    told = isinstance(error, RuntimeError | ValueError) and any(t in str(error) for t in TOO_LARGE)
    return told or isinstance(error, MemoryError)


def _memory_error(error: Exception) -> UsageError:
    said = first_line(error).removesuffix(".")
    return UsageError(
        f"There is not enough memory{f' ({said})' if said else ''}. Give a smaller batch or "
        "shorter inputs, or use a machine with more memory."
    )


def _document(document: Any) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _drawn(show: Callable[[Console], None]) -> str:
    terminal = sys.stdout.isatty()
    page = io.StringIO()
    width = None if terminal else PIPED_WIDTH
    show(Console(file=page, force_terminal=terminal, highlight=False, width=width))
    if terminal:
        return page.getvalue()
    return "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())


def _print(text: str) -> bool:
    """Write to stdout; False, and said on stderr, where the text could not be written.

    A reader that has seen enough (`| head`) is no failure, and must not look like one: exit code 1
    means that a promise was not kept.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        if isinstance(error, BrokenPipeError):
            return True
        print(f"zipc: cannot write to standard output ({error.strerror}).", file=sys.stderr)
        return False
    return True


def _say_error(error: ZipcError, *, as_json: bool) -> None:
    if not as_json:
        print(f"zipc: {error}", file=sys.stderr)
        return
    print_json(error_details(error))


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
