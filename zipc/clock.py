"""How long the stages of a run take, and the thread they run on."""

from __future__ import annotations

import time

import torch

from zipc.core.memory import release
from zipc.core.types import Progress


class one_thread:
    """Torch on one thread: two spinning threads on a busy machine are slower than one."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


class Clock:
    """Passes progress on and remembers how long each stage took."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}
        self._name, self._started = "", 0.0

    def stage(self, name: str, total: int | None = None) -> None:
        self._name, self._started = name, time.monotonic()
        self._progress.stage(name, total)

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.advance(steps, note)

    def info(self, message: str) -> None:
        self._progress.info(message)

    def done(self, note: str = "") -> None:
        spent = time.monotonic() - self._started
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent
        release()
        self._progress.done(note)
