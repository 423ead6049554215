from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zipc.latency_tables.correction import Correction, Point, fit

ratios = st.floats(0.05, 1.5)
clouds = st.lists(st.tuples(ratios, ratios), min_size=1, max_size=15)


def fitted(points: Sequence[Point], *, may_bend: bool = False) -> Correction:
    """Of points that are predicted the same whichever of them are known."""
    cloud = list(points)
    left_out = [(p, [*cloud[:i], *cloud[i + 1 :]]) for i, p in enumerate(cloud)]
    return fit(cloud, left_out, surplus={}, may_bend=may_bend)


def test_perfect_prices_need_no_correction() -> None:
    correction = fitted([(p, p) for p in (0.2, 0.5, 0.9)])
    assert correction.apply(0.1) == correction.invert(0.1) == 0.1
    assert correction.median_error == correction.worst_error == 0.0


def test_errors_are_those_of_points_left_out() -> None:
    known = [(0.5, 0.5), (0.4, 0.4)]
    found = fit(known, [((0.6, 0.5), known[1:]), ((0.4, 0.4), known[:1])], surplus={"each": 1.0})
    assert found.errors == pytest.approx((0.2, 0.0))
    assert (found.median_error, found.worst_error) == pytest.approx((0.1, 0.2))
    assert found.points == tuple(known)
    assert found.surplus == {"each": 1.0}


def test_the_interval_of_a_prediction_holds_what_it_promises() -> None:
    rng = random.Random(0)

    def measured(p: float) -> float:
        return p * rng.gauss(1, 0.03)

    held = []
    for _ in range(60):
        correction = fitted([(p, measured(p)) for p in (rng.uniform(0.15, 0.9) for _ in range(6))])
        for p in (0.2, 0.4, 0.6, 0.8):
            held.append(abs(math.log(measured(p) / correction.apply(p))) <= correction.reach)
    assert 0.9 < sum(held) / len(held) < 1


@settings(max_examples=60, deadline=None)
@given(clouds, st.floats(0.01, 2.0), st.floats(0.01, 2.0))
def test_any_correction_is_sane_monotone_positive_and_invertible(
    points: list[Point], a: float, b: float
) -> None:
    correction = fitted(points, may_bend=True)
    assert 0.5 <= 1 + correction.steeper <= 2.0
    assert correction.apply(1.5) == 1.5
    low, high = sorted((a, b))
    assert 0 < correction.apply(low) <= correction.apply(high)
    assert correction.invert(correction.apply(a)) == pytest.approx(a)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ratios, ratios), min_size=12, max_size=15), st.floats(-0.5, 1.0))
def test_no_legal_line_deviates_less(points: list[Point], steeper: float) -> None:
    found = fitted(points, may_bend=True)

    def deviation(line: Correction) -> float:
        return sum(abs(p - line.steeper * max(line.bend - p, 0) - m) / m for p, m in points)

    other = found.model_copy(update={"steeper": steeper})
    least = min(p for p, _ in points)
    if least - steeper * max(found.bend - least, 0) >= least / 2:
        assert deviation(found) <= deviation(other) + 1e-9


def test_a_steep_line_below_a_bend_never_promises_more_than_the_points_show() -> None:
    predicted = [0.15 + 0.05 * i for i in range(16)]
    points = [(p, p - 0.8 * max(0.3 - p, 0.0)) for p in predicted]
    correction = fitted(points, may_bend=True)
    assert correction.bend == pytest.approx(0.3)
    assert correction.apply(0.15) == pytest.approx(0.15 / 2, abs=0.05)
    least = correction.apply(0.15)
    assert correction.apply(0.05) == pytest.approx(least / 3)
    assert correction.invert(least / 3) == pytest.approx(0.05)


def with_bend(p: float) -> float:
    """Below 0.25 weights come from a cache, in part at first."""
    return p - 0.2 * max(0.25 - p, 0.0)


def test_small_models_may_be_faster_than_the_line_of_the_others() -> None:
    rng = random.Random(0)
    predicted = [0.15 + 0.8 * i / 12 for i in range(12)] + [0.08, 0.1, 0.12, 0.18, 0.21, 0.25]
    points = [(p, with_bend(p) * rng.gauss(1, 0.01)) for p in predicted]
    assert fitted(points).bend == 0
    correction = fitted(points, may_bend=True)
    assert correction.bend == pytest.approx(0.25, abs=0.07)
    for p in (0.09, 0.2, 0.3, 0.9):
        assert correction.apply(p) == pytest.approx(with_bend(p), rel=0.04)
    assert correction.worst_error < 0.08
    assert correction.reach < 0.08
    for p in (0.01, 0.05, 0.1, 0.24, 0.26, 0.8):
        assert correction.invert(correction.apply(p)) == pytest.approx(p)
        assert 0 < correction.apply(p) < correction.apply(p + 0.001)


def test_a_bend_is_seen_by_many_points_only_and_not_in_noise() -> None:
    rng = random.Random(0)
    predicted = [0.1 + 0.8 * i / 17 for i in range(18)]
    assert fitted([(p, with_bend(p)) for p in predicted[:11]], may_bend=True).bend == 0
    noisy = [[(p, p * rng.gauss(1, 0.03)) for p in predicted] for _ in range(8)]
    bends = [fitted(points, may_bend=True).bend for points in noisy]
    assert sum(bend > 0 for bend in bends) <= 1


def test_what_no_allocation_can_reach_inverts_to_nothing() -> None:
    gloomy = Correction(bend=1.0, steeper=-0.5, points=((0.5, 0.75),), errors=(0.0,))
    assert gloomy.apply(0.01) > 0.5
    assert gloomy.invert(0.4) == 0


@pytest.mark.parametrize("points", [[], [(0.5, 0.0)], [(-1.0, 0.5)], [(0.5, math.nan)]])
def test_impossible_points_are_refused(points: list[Point]) -> None:
    with pytest.raises(ValueError, match="positive, finite"):
        fitted(points)
