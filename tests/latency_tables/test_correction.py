from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zipc.latency_tables.correction import Model, fit

ratios = st.floats(0.05, 1.5)
clouds = st.lists(st.tuples(ratios, ratios), min_size=1, max_size=10)


def test_an_unpriced_fixed_part_is_recovered_exactly() -> None:
    # 8 % of the dense time is in no price: measured = 0.08 + 0.92 * predicted.
    correction = fit((p, 0.08 + 0.92 * p) for p in (0.2, 0.35, 0.5, 0.8))
    assert correction.intercept == pytest.approx(0.08)
    assert correction.slope == pytest.approx(0.92)
    assert correction.worst_error == pytest.approx(0.0, abs=1e-9)


def test_perfect_prices_need_no_correction() -> None:
    correction = fit((p, p) for p in (0.2, 0.5, 0.9))
    assert correction.apply(0.1) == pytest.approx(0.1)
    assert correction.median_error == pytest.approx(0.0, abs=1e-9)


def test_one_wild_point_does_not_move_the_line_but_shows_in_the_worst_error() -> None:
    points = [(p, 0.1 + 0.9 * p) for p in (0.15, 0.25, 0.4, 0.5, 0.6, 0.8)]
    correction = fit([*points, (0.3, 0.9)])
    assert correction.apply(0.2) == pytest.approx(0.28)
    assert correction.median_error == pytest.approx(0.0, abs=1e-9)
    assert correction.worst_error == pytest.approx((0.9 - 0.37) / 0.9)


def test_the_error_is_read_on_points_left_out() -> None:
    # Fitted, the only point is met exactly; left out, nothing but the prices predicts it.
    correction = fit([(0.5, 0.6)])
    assert correction.apply(0.5) == pytest.approx(0.6)
    assert correction.worst_error == pytest.approx(abs(0.5 - 0.6) / 0.6)


def test_noisy_points_give_the_true_line_within_the_noise() -> None:
    rng = random.Random(0)
    predicted = [rng.uniform(0.15, 0.9) for _ in range(10)]
    correction = fit((p, (0.06 + 0.94 * p) * rng.gauss(1, 0.02)) for p in predicted)
    for p in (0.2, 0.5, 0.8):
        assert correction.apply(p) == pytest.approx(0.06 + 0.94 * p, rel=0.05)
    assert correction.median_error < 0.05
    assert correction.n == 10


def test_the_interval_of_a_prediction_holds_what_it_promises() -> None:
    rng = random.Random(0)

    def measured(p: float) -> float:
        return (0.06 + 0.94 * p) * rng.gauss(1, 0.03)

    held = []
    for _ in range(60):
        correction = fit((p, measured(p)) for p in (rng.uniform(0.15, 0.9) for _ in range(6)))
        for p in (0.2, 0.4, 0.6, 0.8):
            held.append(abs(math.log(measured(p) / correction.apply(p))) <= correction.reach)
    assert 0.9 < sum(held) / len(held) < 1


@settings(max_examples=60, deadline=None)
@given(clouds, st.floats(0.01, 2.0), st.floats(0.01, 2.0))
def test_any_correction_is_sane_monotone_positive_and_invertible(
    points: list[tuple[float, float]], a: float, b: float
) -> None:
    correction = fit(points)
    assert 0.5 <= correction.slope <= 2.0
    assert abs(correction.intercept + correction.slope - 1) <= 0.08 + 1e-9
    low, high = sorted((a, b))
    assert 0 < correction.apply(low) <= correction.apply(high)
    assert correction.invert(correction.apply(a)) == pytest.approx(a)


@settings(max_examples=100, deadline=None)
@given(clouds, st.floats(0.5, 2.0), st.floats(-0.08, 0.08))
def test_no_legal_line_deviates_less(
    points: list[tuple[float, float]], slope: float, miss: float
) -> None:
    def deviation(intercept: float, slope: float) -> float:
        return sum(abs(intercept + slope * p - m) / m for p, m in [*points, (1.0, 1.0)])

    correction = fit(points)
    intercept = 1 + miss - slope
    assume(intercept >= 0)
    best = deviation(correction.intercept, correction.slope)
    assert best <= deviation(intercept, slope) + 1e-9


def test_no_line_predicts_that_a_small_model_takes_nothing() -> None:
    correction = fit((p, 1.1 * p - 0.1) for p in (0.2, 0.5, 0.6, 0.8))
    assert correction.intercept == pytest.approx(0.0)
    assert 0.92 <= correction.slope < 1


def test_a_steep_line_below_a_bend_never_promises_more_than_the_points_show() -> None:
    predicted = [0.15 + 0.05 * i for i in range(16)]
    points = [(p, p - 0.8 * max(0.3 - p, 0.0)) for p in predicted]
    correction = fit(points, may_bend=True)
    assert correction.bend == pytest.approx(0.3)
    assert correction.apply(0.15) == pytest.approx(0.15 / 2, abs=0.05)
    least = correction.apply(0.15)
    assert correction.apply(0.05) == pytest.approx(least / 3)
    assert correction.invert(least / 3) == pytest.approx(0.05)


def with_bend(p: float) -> float:
    """Below 0.25 weights come from a cache, in part at first."""
    return 0.02 + 0.96 * p - 0.2 * max(0.25 - p, 0.0)


def test_small_models_may_be_faster_than_the_line_of_the_others() -> None:
    rng = random.Random(0)
    predicted = [0.15 + 0.8 * i / 12 for i in range(12)] + [0.08, 0.1, 0.12, 0.18, 0.21, 0.25]
    points = [(p, with_bend(p) * rng.gauss(1, 0.01)) for p in predicted]
    assert fit(points).bend == 0
    correction = fit(points, may_bend=True)
    assert correction.bend == pytest.approx(0.25, abs=0.07)
    for p in (0.09, 0.2, 0.3, 0.9):
        assert correction.apply(p) == pytest.approx(with_bend(p), rel=0.03)
    assert correction.worst_error < 0.08
    assert correction.reach < 0.08
    for p in (0.01, 0.05, 0.1, 0.24, 0.26, 0.8):
        assert correction.invert(correction.apply(p)) == pytest.approx(p)
        assert 0 < correction.apply(p) < correction.apply(p + 0.001)


def test_a_bend_is_seen_by_many_points_only_and_not_in_noise() -> None:
    rng = random.Random(0)
    predicted = [0.1 + 0.8 * i / 17 for i in range(18)]
    assert fit([(p, with_bend(p)) for p in predicted[:11]], may_bend=True).bend == 0
    noisy = [[(p, p * rng.gauss(1, 0.03)) for p in predicted] for _ in range(8)]
    bends = [fit(points, may_bend=True).bend for points in noisy]
    assert sum(bend > 0 for bend in bends) <= 1


def in_integers(number: int, rng: random.Random, off: float) -> Model:
    """A model whose parts are in floats, in integers or in both, and what of it is; `off` is what
    integers take in truth, relative to their prices."""
    predicted = rng.uniform(0.15, 0.9)
    integers = (0.0, 0.9, rng.uniform(0.2, 0.7))[number % 3] * predicted
    measured = predicted + (off - 1) * integers
    others = {"int8-static": integers} if integers else {}
    return Model(predicted, measured * rng.gauss(1, 0.01), others)


@pytest.mark.parametrize("off", [0.9, 1.0, 1.12])
def test_prices_of_integers_may_be_off_beside_those_of_floats(off: float) -> None:
    rng = random.Random(0)
    correction = fit(in_integers(number, rng, off) for number in range(18))
    assert correction.factors == {"int8-static": pytest.approx(off, abs=0.03)}
    for number in range(30):
        predicted, measured, others = in_integers(number, rng, off)
        priced = predicted + sum((correction.factors[n] - 1) * ms for n, ms in others.items())
        assert correction.apply(priced) == pytest.approx(measured, rel=0.05)
    assert correction.worst_error < 0.05
    assert correction.reach < 0.06


def test_one_model_alone_scales_no_prices() -> None:
    floats = [(p, p) for p in (0.2, 0.4, 0.6, 0.8)]
    wild = fit([*floats, Model(0.5, 0.6, {"int8-static": 0.45})])
    assert wild.factors == {"int8-static": pytest.approx(1.0, abs=1e-6)}


def test_prices_of_a_numeric_are_scaled_by_a_quarter_at_most() -> None:
    found = fit(Model(p, p / 2, {"int4-weights": p}) for p in (0.2, 0.3, 0.4, 0.6))
    assert 0.75 - 1e-6 <= found.factors["int4-weights"] < 0.76
    assert all(p > 0 for p, _ in found.points)


def test_what_no_allocation_can_reach_inverts_to_nothing() -> None:
    correction = fit([(0.5, 0.6), (0.25, 0.4)])  # intercept 0.2
    assert correction.invert(0.1) <= 0


@pytest.mark.parametrize("points", [[], [(0.5, 0.0)], [(-1.0, 0.5)], [(0.5, math.nan)]])
def test_impossible_points_are_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="positive, finite"):
        fit(points)
