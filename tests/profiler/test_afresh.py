from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from zipc.core.types import Runner, Workload
from zipc.profiler import afresh
from zipc.profiler.afresh import TOGETHER, Beside, time_afresh
from zipc.profiler.timing import interleave

WORKLOAD = Workload(1, 8, 1)
MS = {b"whole": 2.0, b"floats": 4.0, b"a": 1.0, b"b": 0.5, b"c": 1.5, b"d": 0.25}


@dataclass
class Graph:
    ms: float
    session_options: Mapping[str, object] = field(default_factory=dict)

    def run(self) -> float:
        return self.ms


@dataclass
class Timers:
    """Opens processes in which a graph takes longer the more were loaded before it."""

    slower: float = 0.0
    processes: list[list[bytes]] = field(default_factory=list)  # what each has loaded

    def open(self) -> Process:
        self.processes.append([])
        return Process(self, self.processes[-1])


@dataclass
class Process:
    timers: Timers
    loaded: list[bytes]

    def load(self, model: bytes, *, workload: Workload) -> Graph:
        assert workload is WORKLOAD
        self.loaded.append(model)
        return Graph(MS[model] * (1 + self.timers.slower * (len(self.loaded) - 1)))


def built(names: str) -> list[Callable[[], bytes]]:
    return [lambda name=name: name.encode() for name in names]


def timed(
    names: str, others: list[bytes], *, once: bool = False, slower: float = 0.0
) -> tuple[list[Beside], Timers]:
    timers = Timers(slower)
    found = time_afresh(
        built(names),
        others,
        open_timer=timers.open,
        workload=WORKLOAD,
        rounds=2,
        once=once,
    )
    return found, timers


def test_every_graph_is_timed_beside_the_others() -> None:
    found, _ = timed("abcd", [b"floats", b"whole"])
    assert [one.ms for one in found] == [[MS[n.encode()]] * 2 for n in "abcd"]
    assert {tuple(map(tuple, one.others_ms)) for one in found} == {((4.0, 4.0), (2.0, 2.0))}


def test_no_graph_is_loaded_into_a_process_that_has_loaded_dozens() -> None:
    found, timers = timed("ab" * 20, [b"whole"], slower=0.01)
    assert max(map(len, timers.processes)) == 1 + TOGETHER
    assert max(one.ms[0] / MS[b"a"] for one in found[::2]) <= 1 + 0.01 * TOGETHER


def test_where_loading_takes_minutes_the_others_are_loaded_once() -> None:
    _, timers = timed("abcd", [b"floats", b"whole"], once=True)
    assert timers.processes == [[b"floats", b"whole", b"a", b"b", b"c", b"d"]]


@pytest.mark.parametrize(("held_bytes", "most"), [(1e6, 1 + TOGETHER), (1.0, 2)])
def test_large_graphs_are_held_one_at_a_time(
    held_bytes: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = list[int]()

    def in_turns(runners: Sequence[Runner], **how: int) -> list[list[float]]:
        held.append(len(runners))
        return interleave(runners, **how)

    monkeypatch.setattr(afresh, "HELD_BYTES", held_bytes)
    monkeypatch.setattr(afresh, "interleave", in_turns)
    found, _ = timed("abcd", [b"whole"])
    assert [one.ms[0] for one in found] == [1.0, 0.5, 1.5, 0.25]
    assert max(held) == most
