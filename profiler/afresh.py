"""Graphs timed in fresh processes beside others, each loaded several times.

A graph takes some percent more or less by where in memory it lies, and one that a process loads
after dozens of others more than one that it loads first: its memory is full of holes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from zipc.core.types import Progress, Workload
from zipc.latency_tables.table import Entry
from zipc.profiler.device import GraphTimer, TimedGraph
from zipc.profiler.sweep import PricedGraph
from zipc.profiler.timing import interleave, warm_up

TOGETHER = 3  # graphs that are loaded into one process, beside the others
HELD_BYTES = 400e6  # of whole models that are held at once
WARM_RUNS = 6


class Beside(NamedTuple):
    """Milliseconds of a graph and of those it was timed beside, in turns."""

    ms: Sequence[float]
    others_ms: Sequence[Sequence[float]]


def price_afresh(
    graphs: Sequence[PricedGraph],
    *,
    anchor: bytes,
    open_timer: Callable[[], GraphTimer],
    workload: Workload,
    rounds: int,
    untimed: int,
    loads: int,
    progress: Progress,
    stage: str,
    on_entries: Callable[[list[Entry]], None],
) -> None:
    """Measure every graph as paired samples with the anchor, those of all its loads together.

    `on_entries` receives each entry when it is measured, so that what an interrupted series has
    measured is not lost.
    """

    def done(number: int, seen: list[Beside]) -> None:
        entry = Entry(
            signature=graphs[number].signature,
            level=graphs[number].level,
            samples_ms=tuple(ms for load in seen for ms in load.ms),
            anchor_ms=tuple(ms for load in seen for ms in load.others_ms[0]),
        )
        on_entries([entry])
        progress.advance(note=entry.signature)

    progress.stage(stage, total=len(graphs))
    time_afresh(
        [graph.build for graph in graphs],
        [anchor],
        open_timer=open_timer,
        workload=workload,
        rounds=rounds,
        untimed=untimed,
        loads=loads,
        on_graph=done,
    )
    progress.done(f"{len(graphs)} prices, each of {loads} loads")


def time_afresh(
    builds: Sequence[Callable[[], bytes]],
    others: Sequence[bytes],
    *,
    open_timer: Callable[[], GraphTimer],
    workload: Workload,
    rounds: int,
    untimed: int = 1,
    loads: int = 1,
    once: bool = False,
    on_graph: Callable[[int, list[Beside]], object] = lambda *_: None,
) -> list[list[Beside]]:
    """Time what each of `builds` gives beside `others`, and that anew for every one of `loads`.

    Each timed run follows `untimed` ones of its own. `once` opens a timer and loads the others but
    once, where that takes minutes. `on_graph` hears of each graph that is done, by its number, so
    that what an interrupted series has measured is not lost.
    """
    held = TOGETHER if len(others[0]) * TOGETHER <= HELD_BYTES else 1
    found: list[list[Beside]] = []
    beside: list[TimedGraph] = []
    for start in range(0, len(builds), TOGETHER):
        group = builds[start : start + TOGETHER]
        models = [build() for build in group] if loads > 1 else []
        seen: list[list[Beside]] = [[] for _ in group]
        for _ in range(loads):
            if not once or not beside:
                beside.clear()  # ends the process before the next one needs the memory
                timer = open_timer()
                beside += [_loaded(timer, model, workload) for model in others]
            for first in range(0, len(group), held):
                now = range(first, min(first + held, len(group)))
                graphs = (models[n] if models else group[n]() for n in now)
                runners = [_loaded(timer, graph, workload) for graph in graphs]
                times = interleave([*beside, *runners], rounds=rounds, untimed=untimed)
                for number, ms in zip(now, times[len(others) :], strict=True):
                    seen[number].append(Beside(ms, times[: len(others)]))
                del runners
        for one in seen:
            on_graph(len(found), one)
            found.append(one)
    return found


def _loaded(timer: GraphTimer, model: bytes, workload: Workload) -> TimedGraph:
    graph = timer.load(model, workload=workload)
    warm_up(graph, max_runs=WARM_RUNS)
    return graph
