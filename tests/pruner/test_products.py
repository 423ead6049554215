"""Moments are those of the rows, also where the columns hardly vary."""

from __future__ import annotations

import pytest
import torch

from zipc.pruner.compensate.least_squares import center
from zipc.pruner.products import cross_moment, second_moment


def rows(width: int, *, spread: float, seed: int = 0, count: int = 500) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    mean = 1 + torch.rand(width, generator=rng)
    return mean + spread * torch.randn(count, width, generator=rng)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_covariance_survives_large_means(spread: float) -> None:
    x, y = rows(8, spread=spread), rows(5, spread=spread, seed=1)
    gram, mean = center(second_moment(x), x.sum(0, dtype=torch.float64), len(x))
    torch.testing.assert_close(
        gram, torch.cov(x.T.double()) * 499, rtol=1e-3, atol=1e-3 * spread**2
    )
    cross = cross_moment(y, x) - torch.outer(y.double().sum(0), mean)
    exact = (y.double() - y.double().mean(0)).T @ (x.double() - mean)
    torch.testing.assert_close(cross, exact, rtol=1e-3, atol=0.2 * spread**2)


def test_one_row_has_its_own_square() -> None:
    x = torch.tensor([[3.0, -2.0]])
    torch.testing.assert_close(second_moment(x), torch.tensor([[9.0, -6.0], [-6.0, 4.0]]).double())
