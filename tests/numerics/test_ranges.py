"""Ranges to round in, against what each way of finding them promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zipc.numerics.int8 import activation_range, calibrate, fake_quantize_static
from zipc.numerics.ranges import PERCENTILES, candidate_ranges


def normal(count: int = 20_000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def test_the_first_range_clips_nothing_and_zero_lies_in_every_one() -> None:
    for x in (normal(), normal().abs() + 1, -normal().abs() - 1, torch.full((9,), 3.0)):
        ranges = list(candidate_ranges(x).values())
        assert ranges[0] == (min(float(x.min()), 0.0), max(float(x.max()), 0.0))
        assert all(low <= 0 <= high for low, high in ranges)


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_a_percentile_drops_its_share_at_each_end(percentile: float) -> None:
    x = normal() ** 3
    low, high = candidate_ranges(x)[f"percentile {percentile}"]
    share = 1 - percentile / 100
    bin_width = float(x.max() - x.min()) / 2048
    for end, least in ((high, x), (-low, -x)):
        assert float((least > end + 1e-6).double().mean()) <= share
        assert float((least > end - 2 * bin_width).double().mean()) >= share


def test_entropy_clips_rare_outliers_and_leaves_an_even_spread_alone() -> None:
    x = normal()
    even = candidate_ranges(torch.linspace(-1, 2, 20_000))
    assert even["entropy"] == even["minmax"]
    x[0] = 30.0
    low, high = candidate_ranges(x)["entropy"]
    assert low == float(x.min())
    assert 3 < high < 20


def test_constants_and_zeros_have_ranges() -> None:
    assert candidate_ranges(torch.zeros(5)) == {"minmax": (0.0, 0.0)}
    assert candidate_ranges(torch.full((5,), -2.0))["minmax"] == (-2.0, 0.0)


@pytest.mark.parametrize("power", [1, 3, 5])
def test_the_chosen_range_loses_to_none_of_them(power: int) -> None:
    x = (normal(12_000) ** power).reshape(500, 24)
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))

    def error(low: float, high: float) -> float:
        rounded = fake_quantize_static(x.clone(), activation_range(low, high))
        return float(((rounded - x) @ weight.T).square().sum())

    at = calibrate(x, weight)
    chosen = ((fake_quantize_static(x.clone(), at) - x) @ weight.T).square().sum()
    errors = {way: error(*ends) for way, ends in candidate_ranges(x).items()}
    assert float(chosen) == pytest.approx(min(errors.values()), rel=1e-3)
