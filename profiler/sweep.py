"""The sweep: price many small graphs, each beside the anchor, in as little time as noise allows.

Threads are not tied to processors: on a machine that others use too, a tied thread waits behind
whatever shares its processor. (Two processors at a load of 7: ratios within a series of runs spread
by 50 % where tied, by 22 % where not.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import TypeVar

from zipc.core.types import Level, Progress, Runner
from zipc.latency_tables.table import Entry, EntryKey, entry_key
from zipc.profiler.timing import FEW_RUNS, interleave, warm_up

GROUP = 8  # graphs whose runners are alive together, unless told otherwise
BESIDE = 4  # graphs timed between one run of the anchor and its next
QUIET, NOISY = 0.01, 0.03  # relative noise: below, stop early; above, take more rounds
MAX_EXTENSION = 4  # times `rounds`
STEP = 0.05  # a narrower level slower by more than this is looked at twice
RESERVED = 0.15  # of the budget of time, for what breaks the order of its neighbours
MIN_ROUNDS = 6  # fewer say nothing about the noise

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PricedGraph:
    """One level of one kind of site as a graph to time; `build` gives its serialised bytes."""

    signature: str
    level: Level
    build: Callable[[], bytes]

    @property
    def key(self) -> EntryKey:
        return entry_key(self.signature, self.level)


def sweep(
    graphs: Iterable[PricedGraph],
    *,
    anchor: Runner,
    make_runner: Callable[[bytes], Runner],
    progress: Progress,
    rounds: int = 12,
    untimed: int = 1,
    filler: Runner | None = None,
    seconds_budget: float | None = None,
    group: int = GROUP,
    stage: str = "measuring prices",
    on_entries: Callable[[list[Entry]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Entry]:
    """Measure every graph once, as paired samples with the anchor.

    Graphs of equal signature and level are measured once. An entry stops early when its noise is
    below 1 % and gets up to four times the rounds while it is above 3 %. Entries that break the
    order of their neighbours are measured again and their samples pooled; a real staircase stays.
    Spent, `seconds_budget` (an aim, not a promise) ends the extra rounds: every graph still gets
    the first `max(6, rounds / 2)`. The runners of `group` graphs are alive together; each timed run
    follows `untimed` ones of its own, or, given a `filler`, a run of that, which leaves it nothing
    in the cache, and one of its neighbour in width, which has its code there again. Weights that
    are read from memory take some percent more or less by where in it they lie: beside a filler
    every graph is loaded at least twice.

    `on_entries` receives the entries of each finished group, and later their pooled replacements,
    so that an interrupted sweep can be resumed from what was saved.
    """
    todo = sorted({g.key: g for g in reversed(list(graphs))}.values(), key=_order)
    report = on_entries or (lambda _: None)
    batches = partial(_spread, size=group) if filler is None else partial(_lines, size=group)
    groups = list(batches(todo))
    started = clock()
    measure = partial(_measure, anchor, make_runner, untimed=untimed, filler=filler)
    measured: dict[EntryKey, Entry] = {}
    progress.stage(stage, total=len(todo))
    for number, together in enumerate(groups, start=1):
        deadline = _share(started, seconds_budget, (1 - RESERVED) * number / len(groups))
        entries = measure(together, rounds=rounds, may_extend=_until(deadline, clock))
        measured |= {entry.key: entry for entry in entries}
        report(entries)
        progress.advance(len(together), note=together[-1].signature)

    in_time = _until(_share(started, seconds_budget, 1.0), clock)
    suspects = _out_of_order(measured)
    for together in batches([g for g in todo if g.key in suspects]):
        if not in_time():
            break
        again = measure(together, rounds=2 * rounds, may_extend=in_time)
        pooled = [measured[entry.key].pooled(entry) for entry in again]
        measured |= {entry.key: entry for entry in pooled}
        report(pooled)
    noisy = sum(entry.noise > NOISY for entry in measured.values())
    progress.done(f"{len(measured)} prices, {noisy} of them noisier than {NOISY:.0%}")
    return list(measured.values())


def _measure(
    anchor: Runner,
    make_runner: Callable[[bytes], Runner],
    group: Sequence[PricedGraph],
    *,
    rounds: int,
    untimed: int,
    filler: Runner | None,
    may_extend: Callable[[], bool],
) -> list[Entry]:
    """Time one group, run by run, the anchor beside every few graphs in every round."""
    runners = [make_runner(graph.build()) for graph in group]
    for runner in (anchor, *runners):
        warm_up(runner, max_runs=FEW_RUNS)
    entries: list[Entry | None] = [None] * len(group)
    active = list(range(len(group)))
    chunk = max(MIN_ROUNDS, rounds // 2)
    quiet = QUIET if filler is None else 0.0  # how long a graph is quiet tells nothing of loads
    while active:
        flights = list(_batches(active, BESIDE))
        beside = [r for flight in flights for r in (anchor, *(runners[i] for i in flight))]
        if filler is None:
            samples = iter(interleave(beside, rounds=chunk, untimed=untimed))
        else:
            # the next in width, or of the widest the one before
            alike = dict([*pairwise(reversed(runners)), *pairwise(runners)])
            samples = iter(_filled(beside, filler, alike, rounds=chunk))
        for flight in flights:
            anchor_ms = tuple(next(samples))
            for index in flight:
                new = Entry(
                    signature=group[index].signature,
                    level=group[index].level,
                    samples_ms=tuple(next(samples)),
                    anchor_ms=anchor_ms,
                )
                old = entries[index]
                entries[index] = new if old is None else old.pooled(new)
        if not may_extend():
            break
        active = [i for i in active if _wants_more(entries[i], rounds, quiet)]
        if filler is not None:
            for index in active:
                runners[index] = make_runner(group[index].build())
                warm_up(runners[index], max_runs=FEW_RUNS)
    return [entry for entry in entries if entry is not None]


def _filled(
    runners: Sequence[Runner], filler: Runner, alike: Mapping[Runner, Runner], *, rounds: int
) -> list[list[float]]:
    """Time runners in turns, each after the filler and, if there is one, a runner of the same code
    with weights of its own: in a whole model it is the weights that are cold."""
    lap: list[Runner] = []
    timed = []
    for runner in runners:
        before = [alike[runner]] if runner in alike else []
        timed.append(len(lap) + 1 + len(before))
        lap += [filler, *before, runner]
    samples: list[list[float]] = [[] for _ in runners]
    for _ in range(rounds):  # never backwards
        times = interleave(lap, rounds=1, untimed=0)
        for held, place in zip(samples, timed, strict=True):
            held += times[place]
    return samples


def _wants_more(entry: Entry | None, rounds: int, quiet: float) -> bool:
    if entry is None:
        return True
    taken = len(entry.samples_ms)
    if taken < rounds:
        return entry.noise >= quiet
    return taken < MAX_EXTENSION * rounds and entry.noise > NOISY


def _out_of_order(measured: dict[EntryKey, Entry]) -> set[EntryKey]:
    """Keys of neighbours in width, of one signature and numeric, the narrower of them slower."""
    suspects: set[EntryKey] = set()
    ordered = sorted(measured.values(), key=_order)
    for _, line in groupby(ordered, key=lambda e: _order(e)[:-1]):
        for narrow, wide in pairwise(line):
            if narrow.ratio > (1 + STEP) * wide.ratio:
                suspects |= {narrow.key, wide.key}
    return suspects


def _order(priced: PricedGraph | Entry) -> tuple[str, str, str, int]:
    level = priced.level
    return priced.signature, level.numeric, level.pattern, level.width


def _share(started: float, seconds: float | None, share: float) -> float | None:
    return None if seconds is None else started + seconds * share


def _until(deadline: float | None, clock: Callable[[], float]) -> Callable[[], bool]:
    return lambda: deadline is None or clock() < deadline


def _lines(todo: Sequence[PricedGraph], size: int) -> Iterator[Sequence[PricedGraph]]:
    """Batches of graphs that differ in width alone, each of which has its neighbour beside it."""
    for _, alike in groupby(todo, key=lambda g: _order(g)[:-1]):
        line = list(alike)
        count = max(len(line) // size, 1)
        ends = [len(line) * number // count for number in range(count + 1)]
        yield from (line[start:end] for start, end in pairwise(ends))


def _spread(todo: Sequence[PricedGraph], size: int) -> Iterator[Sequence[PricedGraph]]:
    """Batches of graphs that are far apart in width: what a machine does to one batch alone then
    breaks the order of neighbours, and evens out over the sites of a model."""
    count = math.ceil(len(todo) / size)
    yield from (todo[number::count] for number in range(count))


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
