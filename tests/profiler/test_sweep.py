from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest

from zipc.core.errors import NoisyMeasurement
from zipc.core.types import Level, Silent
from zipc.latency_tables.table import Entry
from zipc.profiler.sweep import GROUP, PricedGraph, sweep

Behaviour = Callable[["Machine", int], float]


class Machine:
    """A fake device: time passes only when a runner runs."""

    def __init__(self, costs: Mapping[int, float | Behaviour], *, seed: int = 0) -> None:
        self.costs = costs
        self.seconds = 0.0
        self.rng = random.Random(seed)
        self.alive: set[int] = set()
        self.most_alive = 0
        self.log: list[int] = []  # what ran, in order; -1 is the anchor
        self.built: list[int] = []

    def clock(self) -> float:
        return self.seconds

    def runner(self, graph: bytes) -> FakeRunner:
        return FakeRunner(self, int(graph))

    def graph(self, width: int, signature: str = "ffn", numeric: str = "fp32") -> PricedGraph:
        def build() -> bytes:
            self.built.append(width)
            return str(width).encode()

        return PricedGraph(signature, Level(width, numeric), build)


class FakeRunner:
    def __init__(self, machine: Machine, width: int) -> None:
        self.machine, self.width, self.runs = machine, width, 0
        if width >= 0:
            machine.alive.add(width)
            machine.most_alive = max(machine.most_alive, len(machine.alive))

    def __del__(self) -> None:
        self.machine.alive.discard(self.width)

    def run(self) -> float:
        cost = self.machine.costs[self.width]
        ms = cost(self.machine, self.runs) if callable(cost) else cost
        self.runs += 1
        self.machine.log.append(self.width)
        self.machine.seconds += ms / 1000
        return ms


ANCHOR, FILLER = -1, -2


def run(
    machine: Machine,
    graphs: list[PricedGraph],
    *,
    rounds: int = 12,
    seconds_budget: float | None = None,
    group: int = GROUP,
    untimed: int = 1,
    filler: FakeRunner | None = None,
    on_entries: Callable[[list[Entry]], None] | None = None,
) -> dict[int, Entry]:
    entries = sweep(
        graphs,
        anchor=machine.runner(b"-1"),
        make_runner=machine.runner,
        rounds=rounds,
        progress=Silent(),
        group=group,
        untimed=untimed,
        filler=filler,
        seconds_budget=seconds_budget,
        on_entries=on_entries,
        clock=machine.clock,
    )
    return {entry.level.width: entry for entry in entries}


def gaussian(ms: float, spread: float) -> Behaviour:
    return lambda machine, _: ms * max(0.05, machine.rng.gauss(1, spread))


def test_every_graph_is_priced_as_its_ratio_to_the_anchor() -> None:
    machine = Machine({ANCHOR: 2.0} | {w: w / 10 for w in range(1, 21)})
    entries = run(machine, [machine.graph(w) for w in range(1, 21)])
    assert {w: e.ratio for w, e in entries.items()} == pytest.approx(
        {w: w / 20 for w in range(1, 21)}
    )


@pytest.mark.parametrize("group", [2, GROUP])
def test_a_steady_machine_stops_early_and_keeps_few_runners_alive(group: int) -> None:
    machine = Machine({ANCHOR: 2.0} | {w: 1.0 + w for w in range(20)})
    entries = run(machine, [machine.graph(w) for w in range(20)], group=group)
    assert {len(e.samples_ms) for e in entries.values()} == {6}
    assert machine.most_alive <= group
    assert machine.alive == set()


def test_each_timed_run_follows_an_untimed_one_of_the_same_runner() -> None:
    machine = Machine({ANCHOR: 1.0, 1: 1.0, 2: 1.0})
    run(machine, [machine.graph(1), machine.graph(2)])
    doubled = machine.log[-2 * 3 * 6 :]
    assert doubled[::2] == doubled[1::2]
    assert doubled.count(ANCHOR) == len(doubled) // 3


def test_each_timed_run_follows_one_of_the_filler_and_one_of_its_neighbour() -> None:
    """What follows a run of its own is free of what is paid in the whole model."""

    def streamed(cold_ms: float) -> Behaviour:
        def cost(machine: Machine, _: int) -> float:
            own = {1: [FILLER, 2], 2: [FILLER, 1]}
            return cold_ms if machine.log[-2:] in own.values() else 0.001

        return cost

    machine = Machine({ANCHOR: 2.0, FILLER: 5.0, 1: streamed(1.0), 2: streamed(3.0), 3: 4.0})
    filler = machine.runner(str(FILLER).encode())
    graphs = [machine.graph(1), machine.graph(2), machine.graph(3, numeric="int8-static")]
    entries = run(machine, graphs, filler=filler)
    assert {w: e.ratio for w, e in entries.items()} == pytest.approx({1: 0.5, 2: 1.5, 3: 2.0})
    round_of_one = [FILLER, ANCHOR, FILLER, 3]
    round_of_two = [FILLER, ANCHOR, FILLER, 2, 1, FILLER, 1, 2]
    assert machine.log[-4:] == round_of_one
    assert round_of_two in [machine.log[i : i + 8] for i in range(len(machine.log))]


@pytest.mark.parametrize("levels", [7, 8, 9, 15, 17, 33])
def test_beside_a_filler_every_graph_of_a_line_has_a_neighbour(levels: int) -> None:
    machine = Machine({ANCHOR: 2.0, FILLER: 5.0} | {w: 1.0 + w for w in range(levels)})
    filler = machine.runner(str(FILLER).encode())
    run(machine, [machine.graph(w) for w in range(levels)], filler=filler)
    ran = [(a, b) for a, b in pairwise(machine.log) if FILLER not in (a, b)]
    timed = {b for a, b in ran if abs(a - b) == 1 and a >= 0}
    assert timed == set(range(levels))
    assert machine.most_alive < 2 * GROUP


def test_what_is_timed_cold_is_loaded_twice() -> None:
    """By where in memory its weights lie, a graph takes some percent more or less."""
    loads = 0

    def placed(_: Machine, runs: int) -> float:
        nonlocal loads
        loads += runs == 0
        return 0.99 if loads == 1 else 1.01

    machine = Machine({ANCHOR: 2.0, FILLER: 5.0, 1: placed})
    entry = run(machine, [machine.graph(1)], filler=machine.runner(str(FILLER).encode()))[1]
    assert loads == 2
    assert entry.ratio == pytest.approx(0.5)


def test_a_graph_with_a_cold_cache_is_priced_warm() -> None:
    """Runs after another graph cost double; the timed run never does."""

    def cold_first(machine: Machine, _: int) -> float:
        return 1.0 if machine.log and machine.log[-1] == 1 else 2.0

    machine = Machine({ANCHOR: 1.0, 1: cold_first})
    assert run(machine, [machine.graph(1)])[1].ratio == pytest.approx(1.0)


def test_a_slowdown_of_the_whole_machine_does_not_tilt_the_prices() -> None:
    def throttled(ms: float) -> Behaviour:
        return lambda machine, _: ms * (1 + machine.seconds)  # slower and slower

    machine = Machine({w: throttled(1.0 + max(w, 0) / 10) for w in range(-1, 24)})
    entries = run(machine, [machine.graph(w) for w in range(24)])
    assert machine.seconds > 0.5
    for width, entry in entries.items():
        assert entry.ratio == pytest.approx(1.0 + width / 10, rel=0.01)


def test_noisy_entries_get_more_rounds_and_quiet_ones_do_not() -> None:
    machine = Machine({ANCHOR: 2.0, 1: 1.0, 2: gaussian(3.0, 0.04), 3: gaussian(5.0, 0.5)})
    entries = run(machine, [machine.graph(w) for w in (1, 2, 3)])
    assert len(entries[1].samples_ms) == 6
    assert 6 < len(entries[2].samples_ms) <= 24
    assert len(entries[3].samples_ms) == 48
    assert entries[3].noise > 0.03


def test_each_timed_run_follows_untimed_ones_of_its_own() -> None:
    def cold_at_first(machine: Machine, _: int) -> float:
        return 2.0 if machine.log[-3:] == [1, 1, 1] else 3.0

    machine = Machine({ANCHOR: 2.0, 1: cold_at_first})
    assert set(run(machine, [machine.graph(1)], untimed=3)[1].samples_ms) == {2.0}


def test_spikes_are_kept_and_reported_but_do_not_move_the_price() -> None:
    def spiky(machine: Machine, _: int) -> float:
        spike = 30.0 if machine.rng.random() < 0.15 else 0.0
        return machine.rng.gauss(2.0, 0.02) + spike

    machine = Machine({ANCHOR: 2.0, 1: spiky})
    entry = run(machine, [machine.graph(1)], rounds=24)[1]
    assert entry.ratio == pytest.approx(1.0, rel=0.02)
    assert max(entry.samples_ms) > 20
    assert entry.outlier_share > 0


def test_a_neighbour_violation_by_bad_luck_is_measured_again_and_pooled() -> None:
    """Something else slows the narrow graph down, steadily, the first time it is measured."""
    unlucky: list[int] = []

    def disturbed(machine: Machine, runs: int) -> float:
        if runs == 0:
            unlucky.append(1)
        return 2.0 if len(unlucky) == 1 else 1.0

    machine = Machine({ANCHOR: 1.0, 1: disturbed, 2: 1.5, 3: 1.8})
    reports: list[list[Entry]] = []
    entries = run(machine, [machine.graph(w) for w in (1, 2, 3)], on_entries=reports.append)
    assert machine.built == [1, 2, 3, 1, 2]
    assert entries[1].ratio == pytest.approx(1.0)
    assert 2.0 in entries[1].samples_ms  # nothing is thrown away
    assert [e.level.width for e in reports[-1]] == [1, 2]
    assert reports[-1][0] == entries[1]


def test_a_real_staircase_is_measured_twice_and_kept_as_measured() -> None:
    machine = Machine({ANCHOR: 1.0, 31: 2.0, 32: 1.0, 64: 2.1})
    entries = run(machine, [machine.graph(w) for w in (31, 32, 64)])
    assert entries[31].ratio == pytest.approx(2.0)
    assert entries[32].ratio == pytest.approx(1.0)
    assert len(entries[31].samples_ms) > len(entries[64].samples_ms)


def test_neighbours_are_of_one_signature_and_numeric() -> None:
    machine = Machine({ANCHOR: 1.0, 1: 5.0, 2: 1.0, 3: 0.5})
    graphs = [machine.graph(1), machine.graph(2, numeric="int8-static"), machine.graph(3, "heads")]
    run(machine, graphs)
    assert sorted(machine.built) == [1, 2, 3]


def test_a_spent_budget_still_prices_every_graph() -> None:
    costs = {ANCHOR: gaussian(2.0, 0.5)} | {w: gaussian(2.0, 0.5) for w in range(32)}
    graphs = 32
    free, tight = Machine(costs), Machine(costs)
    unlimited = run(free, [free.graph(w) for w in range(graphs)])
    limited = run(tight, [tight.graph(w) for w in range(graphs)], seconds_budget=1.0)
    assert len(limited) == graphs
    assert min(len(e.samples_ms) for e in limited.values()) >= 6
    assert tight.seconds < free.seconds / 2
    assert sum(len(e.samples_ms) for e in unlimited.values()) > 2 * sum(
        len(e.samples_ms) for e in limited.values()
    )


def test_a_budget_of_time_is_shared_by_the_groups() -> None:
    """The last groups get extra rounds too, not only the first ones."""
    costs = {ANCHOR: 2.0} | {w: gaussian(2.0 + w / 50, 0.15) for w in range(32)}
    machine = Machine(costs)
    entries = run(machine, [machine.graph(w) for w in range(32)], seconds_budget=4.0)
    assert max(len(entries[w].samples_ms) for w in range(24, 32)) > 6


def test_a_spent_budget_leaves_time_for_what_is_out_of_order() -> None:
    """Every graph would take extra rounds for ever, and the first is slow the first time."""
    tries: list[int] = []

    def unlucky(machine: Machine, runs: int) -> float:
        if runs == 0:
            tries.append(1)
        return (90.0 if len(tries) == 1 else 1.0) * machine.rng.uniform(0.5, 1.5)

    costs = {ANCHOR: gaussian(2.0, 0.5), 0: unlucky} | {w: gaussian(8.0, 0.5) for w in range(1, 24)}
    machine = Machine(costs)
    run(machine, [machine.graph(w) for w in range(24)], seconds_budget=20.0)
    assert machine.built.count(0) == 2


def test_finished_groups_are_reported_before_a_failure() -> None:
    def broken(_machine: Machine, _runs: int) -> float:
        return float("nan")

    machine = Machine({ANCHOR: 1.0} | {w: float(w) for w in range(1, 10)} | {10: broken})
    reports: list[list[Entry]] = []
    with pytest.raises(NoisyMeasurement):
        run(machine, [machine.graph(w) for w in range(1, 11)], on_entries=reports.append)
    assert [[e.level.width for e in entries] for entries in reports] == [[1, 3, 5, 7, 9]]


def test_equal_graphs_are_measured_once() -> None:
    machine = Machine({ANCHOR: 1.0, 0: 0.5, 1: 1.0})
    removed_twice = [machine.graph(0), machine.graph(0, numeric="int8-static")]
    entries = run(machine, [*removed_twice, machine.graph(1), machine.graph(1)])
    assert sorted(entries) == [0, 1]
    assert sorted(machine.built) == [0, 1]


def test_progress_hears_of_every_graph() -> None:
    class Counter(Silent):
        total: int | None = None
        steps = 0

        def stage(self, name: str, total: int | None = None) -> None:
            self.total = total

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.steps += steps

    machine, counter = Machine({ANCHOR: 1.0} | dict.fromkeys(range(20), 1.0)), Counter()
    sweep(
        [machine.graph(w) for w in range(20)],
        anchor=machine.runner(b"-1"),
        make_runner=machine.runner,
        progress=counter,
    )
    assert counter.total == counter.steps == 20


def test_prices_are_accurate_to_a_percent_under_realistic_noise_in_modest_time() -> None:
    """130 graphs of 2 ms, drifting, 3 % jitter, 2 % spikes: device time is counted, not waited."""

    def realistic(ms: float) -> Behaviour:
        def cost(machine: Machine, _: int) -> float:
            drift = 1 + 0.3 * (machine.seconds % 10) / 10
            spike = 3.0 if machine.rng.random() < 0.02 else 1.0
            return ms * drift * spike * max(0.5, machine.rng.gauss(1, 0.03))

        return cost

    truth = {w: 0.5 + 3 * w / 130 for w in range(130)}
    machine = Machine({ANCHOR: realistic(2.0)} | {w: realistic(ms) for w, ms in truth.items()})
    entries = run(machine, [machine.graph(w) for w in range(130)])
    errors = sorted(abs(entries[w].ratio * 2 / ms - 1) for w, ms in truth.items())
    assert errors[65] < 0.012
    assert errors[-1] < 0.06
    assert machine.seconds < 60
