"""The dynamic program against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zipc.pruner.allocate import BudgetTooSmall, pareto, solve

Sites = list[list[tuple[float, float]]]

amount = st.floats(0, 10, allow_nan=False).map(lambda value: round(value, 3))
sites_of_levels = st.lists(
    st.lists(st.tuples(amount, amount), min_size=1, max_size=5), min_size=1, max_size=4
)


def brute(sites: Sites, budget: float) -> float:
    """Least total cost within the budget; infinite when nothing fits."""
    totals = (
        (sum(level[0] for level in choice), sum(level[1] for level in choice))
        for choice in itertools.product(*sites)
    )
    return min((cost for cost, time in totals if time <= budget + 1e-9), default=np.inf)


def unzip(sites: Sites) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return tuple([np.array([x[i] for x in s]) for s in sites] for i in (0, 1))  # type: ignore[return-value]


@settings(deadline=None, max_examples=150)
@given(sites=sites_of_levels, share=st.floats(0, 1.1))
def test_dp_is_never_over_budget_and_loses_at_most_the_rounding(sites: Sites, share: float) -> None:
    costs, times = unzip(sites)
    least, most = sum(t.min() for t in times), sum(t.max() for t in times)
    budget = least + share * (most - least)
    chosen = solve(costs, times, budget=budget, buckets=500)
    cost = sum(c[i] for c, i in zip(costs, chosen, strict=True))
    assert sum(t[i] for t, i in zip(times, chosen, strict=True)) <= budget + 1e-9
    assert cost >= brute(sites, budget) - 1e-9
    assert cost <= brute(sites, budget - len(sites) * (budget - least) / 500 - 2e-9) + 1e-9


@settings(deadline=None, max_examples=60)
@given(
    sites=st.lists(
        st.lists(st.tuples(amount, st.integers(0, 8)), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    slack=st.integers(1, 20),
)
def test_dp_is_optimal_where_the_times_are_whole_buckets(sites: Sites, slack: int) -> None:
    costs, times = unzip(sites)
    budget = float(sum(t.min() for t in times) + slack)
    chosen = solve(costs, times, budget=budget, buckets=slack * 40)
    cost = sum(c[i] for c, i in zip(costs, chosen, strict=True))
    assert cost == pytest.approx(brute(sites, budget))


def test_dp_meets_budget_exactly_when_levels_fit() -> None:
    costs = [np.array([3.0, 1.0, 0.0]), np.array([5.0, 2.0, 0.0])]
    times = [np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])]
    assert solve(costs, times, budget=5.0) == [1, 2]
    assert solve(costs, times, budget=6.0) == [2, 2]
    assert solve(costs, times, budget=2.0) == [0, 0]


def test_what_rounding_up_left_over_is_spent() -> None:
    costs, times = [np.array([1.0, 0.0])] * 3, [np.array([0.0, 1.0])] * 3
    chosen = solve(costs, times, budget=2.0, buckets=5)  # a level takes 3 of 5 buckets
    assert sum(chosen) == 2


@pytest.mark.parametrize("budget", [2.9, 0.0, -4.0, float("nan")])
def test_budget_below_the_fastest_says_what_the_least_is(budget: float) -> None:
    with pytest.raises(BudgetTooSmall) as raised:
        solve([np.array([1.0, 0.0])] * 3, [np.array([1.0, 2.0])] * 3, budget=budget)
    assert raised.value.minimum == 3.0


def test_budget_of_zero_with_free_levels_is_met() -> None:
    assert solve([np.array([4.0, 1.0])], [np.array([0.0, 1.0])], budget=0.0) == [0]


def test_equal_times_give_the_cheapest_and_single_levels_are_taken() -> None:
    costs = [np.array([2.0, 1.0, 3.0]), np.array([7.0])]
    times = [np.array([1.0, 1.0, 1.0]), np.array([1.0])]
    assert solve(costs, times, budget=2.0) == [1, 0]


def test_no_sites_need_no_time() -> None:
    assert solve([], [], budget=0.0) == []


def test_infinite_cost_forbids_a_level() -> None:
    costs, times = [np.array([np.inf, 5.0, 0.0])], [np.array([0.1, 1.0, 2.0])]
    assert solve(costs, times, budget=1.5) == [1]
    with pytest.raises(BudgetTooSmall):
        solve(costs, times, budget=0.5)


@pytest.mark.parametrize(
    ("costs", "times"),
    [([np.nan], [1.0]), ([1.0], [np.inf]), ([1.0, 2.0], [1.0]), ([], []), ([np.inf], [1.0])],
)
def test_senseless_levels_are_refused(costs: list[float], times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"cost|level|match"):
        solve([np.array(costs)], [np.array(times)], budget=10.0)


@given(levels=st.lists(st.tuples(amount, amount), min_size=1, max_size=12))
def test_pareto_drops_exactly_the_dominated_levels(levels: list[tuple[float, float]]) -> None:
    times, costs = (np.array([level[i] for level in levels]) for i in (0, 1))
    kept = pareto(times, costs)
    assert (np.diff(times[kept]) > 0).all()
    assert (np.diff(costs[kept]) < 0).all()
    for time, cost in levels:
        assert ((times[kept] <= time) & (costs[kept] <= cost)).any()
