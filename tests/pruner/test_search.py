"""The search keeps to the budget, finds what brute force finds, and repeats itself by seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from zipc.core.errors import TargetUnreachable
from zipc.core.types import Allocation, Ladder, Level, Rung, Silent
from zipc.pruner.allocate.search import Problem, SearchState, build_problem, search
from zipc.pruner.allocate.sensitivity import probe_count, site_losses

FIXED_MS = 0.5
Truth = dict[str, dict[Level, float]]


def made_problem(
    seed: int, *, sites: int = 4, widths: int = 5, believed: float = 1.0
) -> tuple[Problem, Truth]:
    """Random ladders; the losses the program is told are off by a factor up to `believed`."""
    rng = np.random.default_rng(seed)
    ladders, told, truth = {}, {}, {}
    for s in range(sites):
        name = f"site{s}"
        times = np.sort(rng.uniform(0.05, 1.0, widths))
        errors = np.sort(rng.uniform(0.0, 1.0, widths))[::-1]
        levels = [Level(w) for w in range(widths)]
        order = tuple(range(widths - 1))
        ladders[name] = Ladder(
            name, order, tuple(map(Rung, levels, times.tolist(), errors.tolist()))
        )
        truth[name] = dict(zip(levels, errors.tolist(), strict=True))
        told[name] = {lv: e * believed ** rng.uniform(-1, 1) for lv, e in truth[name].items()}
        told[name] = dict(zip(levels, sorted(told[name].values(), reverse=True), strict=True))
    dense = FIXED_MS + sum(ld.rungs[-1].ms for ld in ladders.values())
    return build_problem(ladders, told, fixed_ms=FIXED_MS, dense_ms=dense), truth


def additive(truth: Truth) -> Callable[[Allocation], float]:
    return lambda a: sum(truth[n][lv] for n, lv in a.levels.items())


def brute_force(problem: Problem, truth: Truth, budget_ms: float) -> float:
    score = additive(truth)
    every = map(problem.allocation, itertools.product(*(range(len(ls)) for ls in problem.levels)))
    return min(score(a) for a in every if a.predicted_ms <= budget_ms + 1e-12)


def run(
    problem: Problem,
    score: Callable[[Allocation], float],
    *,
    budget_ms: float,
    trials: int = 300,
    seed: int = 0,
    state: SearchState | None = None,
    adopt: Callable[[Allocation], None] = lambda a: None,
) -> SearchState:
    return search(
        problem,
        budget_ms=budget_ms,
        score=score,
        adopt=adopt,
        trials=trials,
        seconds=60.0,
        rng=np.random.default_rng(seed),
        progress=Silent(),
        state=state,
    )


def middle(problem: Problem, share: float = 0.5) -> float:
    return problem.fastest_ms + share * (problem.dense_ms - problem.fastest_ms)


@pytest.mark.parametrize("seed", range(6))
def test_search_finds_the_optimum_of_a_separable_problem_it_was_told_wrongly(seed: int) -> None:
    problem, truth = made_problem(seed, believed=8.0)
    budget = middle(problem)
    found = run(problem, additive(truth), budget_ms=budget)
    assert found.loss == pytest.approx(brute_force(problem, truth, budget))


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_search_learns_what_an_additive_program_cannot_know(seed: int) -> None:
    problem, truth = made_problem(seed, sites=5)
    plain = additive(truth)

    def score(a: Allocation) -> float:  # neighbours that are both cut hurt twice
        cut = [lv.width < 3 for lv in a.levels.values()]
        return plain(a) + sum(x and y for x, y in itertools.pairwise(cut))

    budget = middle(problem)
    first = run(problem, score, budget_ms=budget, trials=0)
    every = itertools.product(*(range(len(ls)) for ls in problem.levels))
    best = min(score(a) for a in map(problem.allocation, every) if a.predicted_ms <= budget + 1e-12)
    assert best < first.loss
    assert run(problem, score, budget_ms=budget).loss == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.2))
def test_no_candidate_is_ever_over_the_budget(seed: int, share: float) -> None:
    problem, truth = made_problem(seed)
    budget = middle(problem, share)
    plain, seen = additive(truth), []

    def score(a: Allocation) -> float:
        seen.append(a.predicted_ms)
        return plain(a)

    found = run(problem, score, budget_ms=budget, trials=40)
    assert max(seen) <= budget + 1e-9
    for loss, chosen in found.top:
        allocation = problem.allocation(chosen)
        assert allocation.predicted_ms <= budget + 1e-9
        assert loss == pytest.approx(plain(allocation))
    assert found.top[0][0] == found.loss
    assert tuple(found.chosen) == found.top[0][1]


def test_same_seed_repeats_the_search_and_every_incumbent_is_better() -> None:
    problem, truth = made_problem(3, sites=6, believed=4.0)
    told: list[list[Allocation]] = [[], []]
    first, second = (
        run(problem, additive(truth), budget_ms=middle(problem), trials=60, adopt=log.append)
        for log in told
    )
    assert first.chosen == second.chosen
    assert first.top == second.top
    assert [a.key for a in told[0]] == [a.key for a in told[1]]
    losses = [additive(truth)(a) for a in told[0]]
    assert losses == sorted(losses, reverse=True)


def test_search_goes_on_from_an_earlier_one_under_a_smaller_budget() -> None:
    problem, truth = made_problem(5, believed=8.0)
    wide, narrow = middle(problem, 0.55), middle(problem, 0.5)
    state = run(problem, additive(truth), budget_ms=wide)
    again = run(problem, additive(truth), budget_ms=narrow, trials=0, state=state)
    fresh = run(problem, additive(truth), budget_ms=narrow, trials=0)
    assert problem.allocation(again.chosen).predicted_ms <= narrow + 1e-9
    assert again.loss <= fresh.loss


def test_unreachable_budget_carries_the_best_speedup() -> None:
    problem, truth = made_problem(2)
    with pytest.raises(TargetUnreachable, match="a speedup of") as caught:
        run(problem, additive(truth), budget_ms=problem.fastest_ms * 0.99)
    assert caught.value.best_speedup == pytest.approx(problem.dense_ms / problem.fastest_ms)
    run(problem, additive(truth), budget_ms=problem.fastest_ms * (1 + 1e-9))


def test_levels_that_are_slower_and_no_better_are_not_offered() -> None:
    rungs = tuple(Rung(Level(w), ms, 0.0) for w, ms in ((0, 1.0), (1, 3.0), (2, 2.0), (3, 4.0)))
    losses = {"s": {Level(0): 1.0, Level(1): 0.5, Level(2): 0.4, Level(3): 0.4}}
    problem = build_problem({"s": Ladder("s", (0, 1, 2), rungs)}, losses, fixed_ms=0, dense_ms=4)
    assert problem.levels == [[Level(0), Level(2)]]


EXTRA = {(): 0.0, ("int8",): 0.25, ("2:4",): 0.5, ("int8", "2:4"): 0.6}


def test_losses_of_levels_are_probed_alone_and_rise_as_units_go() -> None:
    from tests.tiny_models import case

    site = case("bert").sites[1]
    levels = [
        *(Level(w, n) for w in range(1, site.units + 1) for n in ("fp32", "int8-dynamic")),
        *(Level(w, n, "2:4") for w in (4, 8) for n in ("fp32", "int8-dynamic")),
        Level(0),
    ]
    errors = {lv: 1 - (lv.width / site.units) ** 2 for lv in levels}
    ladder = Ladder(
        site.name, tuple(range(site.units)), tuple(Rung(lv, 1.0, errors[lv]) for lv in levels)
    )
    asked: list[Level] = []

    def score(a: Allocation) -> float:
        (level,) = a.levels.values()
        asked.append(level)
        return 2 * errors[level] + EXTRA[level.differs]

    found = site_losses({site.name: site}, {site.name: ladder}, score=score, on_probe=lambda: None)[
        site.name
    ]
    assert len(asked) <= probe_count({site.name: ladder})
    for level, loss in found.items():  # linear in the ladder's error, so interpolation is exact
        assert loss == pytest.approx(2 * errors[level] + EXTRA[level.differs])
    assert Level(site.units, "fp32", "2:4") not in asked  # it is not offered there


def test_widths_that_no_error_tells_apart_lie_on_a_line_between_those_probed() -> None:
    """As of a site with more units than rows were seen: what is left explains all rows exactly."""
    from tests.tiny_models import case

    site = case("bert").sites[1]
    widths = range(site.units + 1)
    errors = {w: max(1 - w / 3, 0.0) for w in widths}
    rungs = tuple(Rung(Level(w), 1.0, errors[w]) for w in widths)
    ladder = Ladder(site.name, tuple(range(site.units)), rungs)

    def score(a: Allocation) -> float:
        (level,) = a.levels.values()
        return float(site.units - level.width)

    found = site_losses({site.name: site}, {site.name: ladder}, score=score, on_probe=lambda: None)
    losses = [found[site.name][Level(w)] for w in reversed(widths)]
    assert losses == pytest.approx(list(map(float, widths)))


@pytest.mark.parametrize("seed", range(4))
def test_what_lies_in_units_that_are_gone_saves_nothing_more(seed: int) -> None:
    """The first site's units hold one of the others each, as experts hold their own widths."""
    rng = np.random.default_rng(seed)
    names = ["mixture", "a", "b", "c"]
    ladders, losses = {}, {}
    for name in names:
        least = 1 if name == "mixture" else 0
        levels = [Level(w) for w in range(least, 4)]
        times = np.sort(rng.uniform(0.1, 1.0, len(levels))).tolist()
        errors = np.sort(rng.uniform(0.0, 1.0, len(levels)))[::-1].tolist()
        ladders[name] = Ladder(name, (2, 0, 1), tuple(map(Rung, levels, times, errors)))
        losses[name] = dict(zip(levels, errors, strict=True))
    problem = build_problem(
        ladders, losses, fixed_ms=0.5, dense_ms=3.0, nested={"mixture": [["a"], ["b"], ["c"]]}
    )

    def score(a: Allocation) -> float:
        kept = ladders["mixture"].kept(a.levels["mixture"].width)
        for unit, name in enumerate("abc"):
            assert unit in kept or a.levels[name].width == 3
        return sum(losses[n][lv] for n, lv in a.levels.items())

    every = [
        problem.allocation(chosen)
        for chosen in itertools.product(*(range(len(ls)) for ls in problem.levels))
    ]
    budget = float(np.median([a.predicted_ms for a in every]))
    best = min(score(a) for a in every if a.predicted_ms <= budget)
    found = run(problem, score, budget_ms=budget)
    assert found.loss == pytest.approx(best)
    assert all(problem.allocation(c).predicted_ms <= budget + 1e-9 for _, c in found.top)


def test_2_4_that_gains_nothing_costs_what_the_same_costs_without() -> None:
    levels = [Level(4), Level(8), Level(4, pattern="2:4"), Level(8, pattern="2:4"), Level(0)]
    times = [np.array([1.0, 2.0, 0.7, 2.1, 0.0]), np.array([1.0, 2.0, 0.7, 1.4, 0.0])]
    losses = [np.zeros(5), np.zeros(5)]
    problem = Problem(["a", "b"], [levels, levels], times, losses, 0.0, 4.0)
    assert problem.gains_nothing_("a")
    assert problem.times[0].tolist() == [1.0, 2.0, 1.0, 2.1, 0.0]
    assert problem.times[1].tolist() == [1.0, 2.0, 0.7, 1.4, 0.0]
    assert not problem.gains_nothing_("a")
