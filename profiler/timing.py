"""Timing several runners fairly: alternately, each with its own caches warm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from zipc.core.errors import NoisyMeasurement
from zipc.core.types import Runner
from zipc.profiler.agent import alternate, no_collection

STEADY = 1.05  # largest spread of three consecutive warm runs
FEW_RUNS = 6  # that are enough for a graph which runs untimed before each run that is timed


@runtime_checkable
class Elsewhere(Protocol):
    """A runner in another process, which is asked for many runs at once.

    A pause between two runs, as asking for each would make, slows small graphs by a third.
    """

    @property
    def at_once(self) -> int:
        """Rounds to ask for in one series."""
        ...

    def series(self, runners: Sequence[Runner], *, rounds: int, untimed: int) -> list[list[float]]:
        """What `interleave` gives; all runners are of one process."""
        ...


def interleave(
    runners: Sequence[Runner],
    *,
    rounds: int,
    untimed: int = 1,
    on_round: Callable[[], object] | None = None,
) -> list[list[float]]:
    """Time the runners run by run and return the milliseconds of each, in order.

    Each timed run directly follows `untimed` runs of the same runner, so that the cache is its
    own; every other round goes backwards, so that a drift favours nobody, and so does every other
    series, whose first run is slower after the pause.

    Raises:
        NoisyMeasurement: a runner returned something that is not a positive time.
    """
    first = runners[0]
    if isinstance(first, Elsewhere):
        samples: list[list[float]] = [[] for _ in runners]
        order = list(zip(runners, samples, strict=True))
        for done in range(0, rounds, first.at_once):
            count = min(first.at_once, rounds - done)
            taken = first.series([r for r, _ in order], rounds=count, untimed=untimed)
            for (_, held), more in zip(order, taken, strict=True):
                held += more
            order.reverse()
            for _ in range(count):
                if on_round is not None:
                    on_round()
        return samples
    runs = [partial(_timed, runner) for runner in runners]
    return alternate(runs, rounds=rounds, untimed=untimed, on_round=on_round)


def warm_up(runner: Runner, *, max_runs: int = 50) -> list[float]:
    """Run until three consecutive times agree within 5 %, or `max_runs`; return the times.

    Raises:
        NoisyMeasurement: the runner returned something that is not a positive time.
    """
    times: list[float] = []
    with no_collection():
        while len(times) < max_runs:
            times.append(_timed(runner))
            if len(times) >= 3 and max(times[-3:]) <= STEADY * min(times[-3:]):
                break
    return times


def _timed(runner: Runner) -> float:
    ms = runner.run()
    if not (math.isfinite(ms) and ms > 0):
        raise NoisyMeasurement(
            f"{type(runner).__name__} measured {ms} ms, which is no time. "
            "The clock of this machine cannot be trusted; run again on another one."
        )
    return ms
