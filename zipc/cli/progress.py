"""Progress on stderr: a live line per stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars

from zipc.core.types import Progress

LINE_EVERY_S = 10.0  # between two plain lines of one stage


@contextmanager
def open_progress(console: Console | None = None) -> Iterator[Progress]:
    """Yield the `Progress` that suits `console` (stderr by default), and close its last stage."""
    console = console or Console(stderr=True, highlight=False)
    if not console.is_terminal:
        lines = Lines(lambda text: console.print(text, markup=False, soft_wrap=True))
        yield lines
        lines.done()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        live = Live(bars)
        yield live
        live.done()


class Lines:
    """A `Progress` in plain lines: a stage's start, now and then where it is, its end."""

    def __init__(
        self, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._name = ""
        self._total: int | None = None
        self._steps = 0
        self._began = 0.0
        self._told = 0.0

    def stage(self, name: str, total: int | None = None) -> None:
        self.done()
        self._name, self._total, self._steps = name, total, 0
        self._began = self._told = self._clock()
        self._write(f"{name} ...")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._steps += steps
        now = self._clock()
        if self._name and now - self._told >= LINE_EVERY_S:
            self._told = now
            of = f"/{self._total}" if self._total is not None else ""
            self._write(f"{self._name}: {self._steps}{of}{_tail(note)}")

    def info(self, message: str) -> None:
        self._write(message)

    def done(self, note: str = "") -> None:
        if self._name:
            self._write(f"{self._name}: {self._clock() - self._began:.1f} s{_tail(note)}")
            self._name = ""


class Live:
    """A `Progress` as one live line per stage; a finished stage stays as a line above it."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._name = ""
        self._began = 0.0

    def stage(self, name: str, total: int | None = None) -> None:
        self.done()
        self._name, self._began = name, time.monotonic()
        self._task = self._bars.add_task(escape(name), total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        if self._task is not None:
            self._bars.update(self._task, advance=steps, note=escape(note))

    def info(self, message: str) -> None:
        self._bars.console.print(message, markup=False, soft_wrap=True)

    def done(self, note: str = "") -> None:
        if self._task is None:
            return
        self._bars.remove_task(self._task)
        self._task = None
        elapsed = f"{time.monotonic() - self._began:.1f} s"
        self._bars.console.print(
            f"[green]✓[/] {escape(self._name)} [dim]{elapsed}{escape(_tail(note))}[/]",
            soft_wrap=True,
        )


def _tail(note: str) -> str:
    return f" · {note}" if note else ""
