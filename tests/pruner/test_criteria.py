"""All criteria give a complete order with the errors of the refit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zipc.pruner.criteria import CRITERIA
from zipc.pruner.obs import errors_at

WIDTH = 48


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(WIDTH // 4, 500, generator=rng, dtype=torch.float64)
    x = torch.nn.functional.gelu(torch.randn(WIDTH, WIDTH // 4, generator=rng).double() @ base)
    x *= torch.rand(WIDTH, 1, generator=rng, dtype=torch.float64) * 3
    return torch.randn(16, WIDTH, generator=rng), x @ x.T


@pytest.mark.parametrize("each", [1, 8])
@pytest.mark.parametrize("name", list(CRITERIA))
def test_every_criterion_orders_all_units_and_says_what_they_cost(
    name: str, each: int, problem: tuple[torch.Tensor, torch.Tensor]
) -> None:
    columns = torch.arange(WIDTH).view(-1, each)
    result = CRITERIA[name](*problem, unit_columns=columns, rng=np.random.default_rng(0))
    assert sorted(result.order) == list(range(len(columns)))
    exact = errors_at(*problem, result.order, columns, range(len(columns) + 1))
    assert result.errors == tuple(exact[len(columns) - gone] for gone in range(len(columns) + 1))


def test_obs_errs_least(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    columns, half = torch.arange(WIDTH).view(-1, 1), WIDTH // 2
    errors = {
        name: criterion(*problem, unit_columns=columns, rng=np.random.default_rng(0)).errors[half]
        for name, criterion in CRITERIA.items()
    }
    assert errors["obs"] == min(errors.values())
    assert errors["obs"] < 0.9 * errors["random"]


def test_magnitude_ignores_inputs_and_act_norm_does_not() -> None:
    weight, gram = (
        torch.diag(torch.tensor([1.0, 2.0, 3.0])),
        torch.diag(torch.tensor([100.0, 1.0, 1.0])),
    )
    columns, rng = torch.arange(3).view(-1, 1), np.random.default_rng(0)
    assert CRITERIA["magnitude"](weight, gram, unit_columns=columns, rng=rng).order == (0, 1, 2)
    assert CRITERIA["act_norm"](weight, gram, unit_columns=columns, rng=rng).order == (1, 2, 0)


def test_random_follows_its_generator(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    columns = torch.arange(WIDTH).view(-1, 1)
    orders = [
        CRITERIA["random"](*problem, unit_columns=columns, rng=np.random.default_rng(seed)).order
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
