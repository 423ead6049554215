"""Graphs timed in fresh processes beside others.

A graph takes some percent more or less by where in memory it lies, and one that a process loads
after dozens of others more than one that it loads first: its memory is full of holes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from zipc.core.types import Workload
from zipc.profiler.device import GraphTimer, TimedGraph
from zipc.profiler.timing import FEW_RUNS, interleave, warm_up

TOGETHER = 3  # graphs that are loaded into one process, beside the others
HELD_BYTES = 1.5e9  # of whole models that are held at once beside the others


class Beside(NamedTuple):
    """Milliseconds of a graph and of those it was timed beside, in turns."""

    ms: Sequence[float]
    others_ms: Sequence[Sequence[float]]


def time_afresh(
    builds: Sequence[Callable[[], bytes]],
    others: Sequence[bytes],
    *,
    open_timer: Callable[[], GraphTimer],
    workload: Workload,
    rounds: int,
    untimed: int = 1,
    once: bool = False,
    on_graph: Callable[[], object] = lambda: None,
) -> list[Beside]:
    """Time what each of `builds` gives beside `others`, few of them in any one process.

    Each timed run follows `untimed` ones of its own. `once` opens a timer and loads the others but
    once, where that takes minutes. `on_graph` hears of each graph that is done.
    """
    held = TOGETHER if len(others[0]) * TOGETHER <= HELD_BYTES else 1
    found: list[Beside] = []
    beside: list[TimedGraph] = []
    for first in range(0, len(builds), held):
        if not beside or (not once and first % TOGETHER == 0):
            beside.clear()  # ends the process before the next one needs the memory
            timer = open_timer()
            beside += [_loaded(timer, model, workload) for model in others]
        runners = [_loaded(timer, build(), workload) for build in builds[first : first + held]]
        times = interleave([*beside, *runners], rounds=rounds, untimed=untimed)
        for ms in times[len(others) :]:
            found.append(Beside(ms, times[: len(others)]))
            on_graph()
        del runners
    return found


def _loaded(timer: GraphTimer, model: bytes, workload: Workload) -> TimedGraph:
    graph = timer.load(model, workload=workload)
    warm_up(graph, max_runs=FEW_RUNS)
    return graph
