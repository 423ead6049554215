"""Factors moved through a product leave it what it is, and even channels out before rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zipc.numerics.int8 import calibrate, fake_quantize_static, quantize_weight
from zipc.numerics.smooth import ALPHAS, Reading, best_factors, factors, of_channels


def reading(*, outliers: float, seed: int = 0, rows: int = 600) -> Reading:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 32, generator=generator)
    x[:, ::8] *= outliers
    weight = torch.randn(24, 32, generator=generator)
    return Reading(x, weight, torch.arange(32))


def rounded_error(
    x: Tensor, weight: Tensor, s: Tensor, *, calibrated: Tensor, signed: bool = False
) -> float:
    """Of rows, in the range that was calibrated on others."""
    small, large = x / s, weight * s
    at = calibrate(calibrated / s, large, signed=signed)
    got = fake_quantize_static(small, at) @ quantize_weight(large).dequantized().T
    return float((got - x @ weight.T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_factors_are_those_of_the_paper_in_a_unit_that_keeps_the_largest_input(
    alpha: float,
) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, columns = (torch.rand(20, generator=generator) + 0.1 for _ in range(2))
    found = factors(inputs, columns, alpha)
    ratio = found / (inputs**alpha / columns ** (1 - alpha))
    torch.testing.assert_close(ratio, ratio[:1].expand(20))
    assert float((inputs / found).max()) == pytest.approx(float(inputs.max()))


def test_channels_and_columns_of_zeros_have_finite_factors() -> None:
    inputs, columns = torch.tensor([0.0, 1.0, 50.0]), torch.tensor([1.0, 0.0, 1.0])
    for alpha in ALPHAS:
        for found in (factors(inputs, columns, alpha), factors(0 * inputs, 0 * columns, alpha)):
            assert bool(torch.isfinite(found).all())
            assert bool((found > 0).all())


def test_a_product_stays_what_it_is() -> None:
    held = reading(outliers=30.0)
    x, weight = held.x.double(), held.weight.double()
    s = best_factors([held], 32, limit=127, signed=False)
    assert s is not None
    got = (x / s) @ (weight * s).T
    assert float((got - x @ weight.T).abs().max()) < 1e-10 * float((x @ weight.T).abs().max())


@pytest.mark.parametrize("signed", [False, True])
def test_outliers_no_longer_cost_what_they_did(signed: bool) -> None:
    held = reading(outliers=100.0)
    held.weight[:, ::8] /= 100.0  # as wide in the outputs as the others
    s = best_factors([held], 32, limit=127, signed=signed)
    assert s is not None
    fresh = reading(outliers=100.0, seed=5).x  # rows that were not calibrated on
    before, after = (
        rounded_error(fresh, held.weight, by, calibrated=held.x, signed=signed)
        for by in (torch.ones(32), s)
    )
    assert after < 0.1 * before


@pytest.mark.parametrize("seed", range(5))
def test_channels_of_one_size_are_left_as_they_are(seed: int) -> None:
    held = reading(outliers=1.0, seed=seed)
    held.x.clamp_(-2, 2)
    held.weight.clamp_(-0.5, 0.5)
    assert best_factors([held], 32, limit=127, signed=False) is None


@pytest.mark.parametrize("seed", range(5))
def test_tails_of_the_rows_seen_are_not_taken_for_sizes_of_channels(seed: int) -> None:
    """Some channels are seen with a large value: of fresh rows it will be others."""
    held = reading(outliers=1.0, seed=seed)
    held.x.pow_(5)
    held.weight.clamp_(-0.5, 0.5)
    s = best_factors([held], 32, limit=127, signed=False)
    fresh = reading(outliers=1.0, seed=seed + 50).x.pow(5)
    before = rounded_error(fresh, held.weight, torch.ones(32), calibrated=held.x)
    if s is not None:
        assert rounded_error(fresh, held.weight, s, calibrated=held.x) < 1.05 * before


def test_one_row_says_nothing() -> None:
    held = reading(outliers=100.0, rows=1)
    assert best_factors([held], 32, limit=127, signed=False) is None


def test_channels_that_share_a_factor_get_one_and_others_none() -> None:
    held = reading(outliers=1.0)
    index = torch.arange(32) // 8
    for large in (index == 1, index == 3):
        held.x[:, large] *= 100.0
        held.weight[:, large] /= 100.0
    index[24:] = -1
    s = best_factors([Reading(held.x, held.weight, index)], 5, limit=127, signed=False)
    assert s is not None
    each = of_channels(s, index)
    assert bool((each[24:] == 1).all())
    assert len(each[:24].unique()) == 3
    assert float(s[3]) == float(s[4]) == 1.0  # nothing reads these
