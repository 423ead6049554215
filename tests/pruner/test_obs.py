"""The lazy-blocked sweep against the textbook loop, and its errors against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zipc.core.errors import UsageError
from zipc.pruner import obs
from zipc.pruner.compensate.least_squares import refit
from zipc.pruner.obs import errors_at, sweep, sweep_reference


def inputs(width: int, tokens: int, seed: int, *, rank: int | None = None) -> Tensor:
    """Correlated, skewed activations (in, tokens) like those behind a GELU."""
    rng = torch.Generator().manual_seed(seed)
    rank = rank or max(1, width // 2)
    mix = torch.randn(width, rank, generator=rng, dtype=torch.float64) / rank**0.5
    x = mix @ torch.randn(rank, tokens, generator=rng, dtype=torch.float64)
    noise = 0.3 * torch.randn(width, tokens, generator=rng, dtype=torch.float64)
    return torch.nn.functional.gelu(x + noise)


def weights(out: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(out, width, generator=rng, dtype=torch.float64).to(dtype)


def units(width: int, each: int = 1) -> Tensor:
    return torch.arange(width).view(-1, each)


def direct_error(weight: Tensor, x: Tensor, keep: Tensor) -> float:
    zero = torch.zeros(x.shape[0], dtype=torch.float64)
    kept, _ = refit(weight.double(), None, x @ x.T, zero, keep=keep)
    lost = weight.double() @ x - kept @ x[keep]
    return float(lost.square().sum() / (weight.double() @ x).square().sum())


@settings(deadline=None, max_examples=25)
@given(
    width=st.integers(1, 70),
    out=st.integers(1, 30),
    block=st.integers(1, 20),
    seed=st.integers(0, 10_000),
)
def test_lazy_blocks_eliminate_in_the_order_of_the_plain_loop(
    width: int, out: int, block: int, seed: int
) -> None:
    x, weight = inputs(width, 4 * width + 8, seed), weights(out, width, seed)
    columns = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).view(-1, 1)
    fast = sweep(weight, x @ x.T, unit_columns=columns, block=block, refit_damp=1e-2)
    slow = sweep_reference(weight, x @ x.T, unit_columns=columns)
    assert fast.order == slow.order
    assert fast.errors == pytest.approx(slow.errors, abs=1e-9)


@pytest.mark.parametrize("each", [2, 8])
def test_heads_eliminate_in_the_order_of_the_plain_loop(each: int) -> None:
    x, weight = inputs(64, 400, each), weights(20, 64, each)
    columns = torch.randperm(64, generator=torch.Generator().manual_seed(each)).view(-1, each)
    fast = sweep(weight, x @ x.T, unit_columns=columns, refit_damp=1e-2)
    slow = sweep_reference(weight, x @ x.T, unit_columns=columns)
    assert fast.order == slow.order
    assert fast.errors == pytest.approx(slow.errors, abs=1e-9)


def test_first_head_removed_is_the_one_of_least_refitted_error() -> None:
    x, weight, columns = inputs(48, 600, 3), weights(16, 48, 3), units(48, 8)
    result = sweep(weight, x @ x.T, unit_columns=columns, damp=1e-8)
    alone = [
        direct_error(weight, x, torch.cat([columns[:u], columns[u + 1 :]]).flatten())
        for u in range(6)
    ]
    assert result.order[0] == min(range(6), key=alone.__getitem__)


def test_greedy_is_near_the_best_subset_and_never_better() -> None:
    x, weight, columns = inputs(16, 300, 5), weights(10, 16, 5), units(16, 2)
    result = sweep(weight, x @ x.T, unit_columns=columns)
    for width in range(1, 8):
        best = min(
            direct_error(weight, x, columns[list(kept)].flatten())
            for kept in itertools.combinations(range(8), width)
        )
        assert best * (1 - 1e-9) <= result.errors[8 - width] <= 1.3 * best


@pytest.mark.parametrize("each", [1, 4])
def test_errors_equal_the_direct_output_error_at_every_width(each: int) -> None:
    x, weight, columns = inputs(40, 300, 9), weights(12, 40, 9), units(40, each)
    result = sweep(weight, x @ x.T, unit_columns=columns)
    assert len(result.errors) == len(columns) + 1
    assert result.errors[0] == 0.0
    assert result.errors[-1] == pytest.approx(1.0)
    for gone in range(1, len(columns)):
        keep = columns[sorted(result.order[gone:])].flatten()
        assert result.errors[gone] == pytest.approx(direct_error(weight, x, keep), rel=1e-6)


def test_errors_at_serves_any_order_and_crosses_panels() -> None:
    x, weight, columns = inputs(300, 900, 2), weights(8, 300, 2), units(300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
    found = errors_at(weight, x @ x.T, order, columns, [0, 1, 43, 256, 257, 299, 300])
    assert set(found) == {0, 1, 43, 256, 257, 299, 300}
    for width, error in found.items():
        keep = torch.tensor(order[300 - width :], dtype=torch.long)
        assert error == pytest.approx(direct_error(weight, x, keep), rel=1e-6, abs=1e-12)


def test_fp32_loop_finds_the_error_curve_of_fp64() -> None:
    x, weight = inputs(256, 2000, 4), weights(64, 256, 4, torch.float32)
    single = sweep(weight, x @ x.T, unit_columns=units(256))
    double = sweep(weight.double(), x @ x.T, unit_columns=units(256))
    assert single.errors == pytest.approx(double.errors, abs=1e-5)


def test_dead_columns_go_first_and_cost_nothing() -> None:
    x, weight = inputs(30, 200, 6), weights(9, 30, 6)
    x[[4, 17, 23]] = 0.0
    result = sweep(weight, x @ x.T, unit_columns=units(30))
    assert result.order[:3] == (4, 17, 23)
    assert result.errors[:4] == pytest.approx((0, 0, 0, 0), abs=1e-12)
    assert result.errors[4] > 0


def test_all_dead_inputs_give_index_order_and_no_error() -> None:
    result = sweep(weights(3, 5, 0), torch.zeros(5, 5), unit_columns=units(5))
    assert result.order == (0, 1, 2, 3, 4)
    assert result.errors == (0.0,) * 6


def test_equal_columns_go_in_index_order() -> None:
    result = sweep(torch.ones(2, 12), torch.eye(12), unit_columns=units(12), block=5)
    assert result.order == tuple(range(12))


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_of_the_same_features_are_removed_almost_for_free(
    each: int, dtype: torch.dtype
) -> None:
    x = inputs(32, 500, 8, rank=32).repeat(3, 1)  # rank 32 of 96
    weight = weights(24, 96, 8, dtype)
    result = sweep(weight, x @ x.T, unit_columns=units(96, each))
    assert sorted(result.order) == list(range(96 // each))
    assert result.errors[64 // each] < 1e-6


@pytest.mark.parametrize(("each", "damp", "apart"), [(1, 1e-10, 1e-5), (8, 1e-17, 1e-9)])
def test_lost_precision_is_repaired_by_factoring_again(
    each: int, damp: float, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fresh = obs._Problem.state

    def counted(problem: obs._Problem, columns: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(columns))
        return fresh(problem, columns)

    monkeypatch.setattr(obs._Problem, "state", counted)
    x = inputs(96, 400, 7, rank=6) ** 3
    x[::3] *= 1e3
    x[1::3] = x[::3] * (1 + apart * inputs(32, 400, 1))
    weight = weights(16, 96, 7)
    single = sweep(weight.float(), x @ x.T, unit_columns=units(96, each), damp=damp)
    assert len(calls) > 1  # the loop noticed
    double = sweep(weight, x @ x.T, unit_columns=units(96, each), damp=1e-10)
    assert sorted(single.order) == sorted(double.order)
    half = len(single.order) // 2
    assert single.errors[half] <= 2 * double.errors[half] + 1e-6


def test_fewer_tokens_than_columns_do_not_fail() -> None:
    x = inputs(80, 10, 2)
    result = sweep(weights(8, 80, 2), x @ x.T, unit_columns=units(80))
    assert result.errors[60] < 1e-4  # ten tokens need no more than ten columns, or so
    assert max(result.errors) <= 1 + 1e-9


def test_nan_activations_are_named() -> None:
    gram = torch.eye(4, dtype=torch.float64)
    gram[1, 2] = float("nan")
    with pytest.raises(UsageError, match="calibration activations contain NaN"):
        sweep(torch.ones(2, 4), gram, unit_columns=units(4))


def test_units_that_miss_a_column_are_refused() -> None:
    with pytest.raises(ValueError, match="every column exactly once"):
        sweep(torch.ones(2, 4), torch.eye(4), unit_columns=torch.tensor([[0], [1], [2]]))
