"""The closed-form refit against lstsq, running updates and direct output errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zipc.core.errors import UsageError
from zipc.pruner.compensate import COMPENSATORS
from zipc.pruner.compensate.least_squares import center, damped_cholesky, refit
from zipc.pruner.obs import eliminate_plainly


def sample(width: int, tokens: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64)
    x = mix @ torch.randn(width, tokens, generator=rng, dtype=torch.float64)
    return x + torch.randn(width, 1, generator=rng, dtype=torch.float64)  # not centred


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return center(x @ x.T, x.sum(dim=1), x.shape[1])


def layer(out: int, width: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=rng, dtype=torch.float64)
    return weight, torch.randn(out, generator=rng, dtype=torch.float64)


def output_error(
    x: Tensor, dense: tuple[Tensor, Tensor], small: tuple[Tensor, Tensor], keep: Tensor
) -> float:
    want = dense[0] @ x + dense[1][:, None]
    return float((want - small[0] @ x[keep] - small[1][:, None]).square().sum())


def test_center_gives_the_covariance_times_the_count() -> None:
    x = sample(12, 300)
    gram, mean = statistics(x)
    torch.testing.assert_close(gram, torch.cov(x) * 299)
    torch.testing.assert_close(mean, x.mean(dim=1))


def test_constant_features_are_left_to_the_bias() -> None:
    x = sample(6, 100)
    x[2] = 0.3
    gram, mean = statistics(x)
    assert gram[2].count_nonzero() == 0
    assert gram[:, 2].count_nonzero() == 0
    dense, keep = layer(4, 6), torch.tensor([0, 1, 3, 4, 5])
    small = refit(*dense, gram, mean, keep=keep)
    assert output_error(x, dense, small, keep) == pytest.approx(0.0, abs=1e-18)
    torch.testing.assert_close(small[0], dense[0][:, keep])


def test_noise_is_added_to_what_varies_and_draws_weights_to_what_they_were() -> None:
    x = sample(6, 400)
    x[2] = 0.3
    gram, mean = statistics(x)
    noisy, _ = center(x @ x.T, x.sum(dim=1), 400, noise=1e-2)
    added = torch.full((6,), 1e-2 * float((x @ x.T).diagonal().mean()), dtype=torch.float64)
    added[2] = 0.0
    torch.testing.assert_close(noisy - gram, torch.diag(added))
    (weight, bias), keep = layer(4, 6), torch.tensor([0, 1, 3])
    moved = [
        float((refit(weight, bias, g, mean, keep=keep)[0] - weight[:, keep]).norm())
        for g in (gram, noisy)
    ]
    assert moved[1] < moved[0]


def test_center_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="--data"):
        center(torch.zeros(2, 2), torch.zeros(2), 0)


def test_undamped_refit_is_the_least_squares_solution() -> None:
    x, dense = sample(10, 200), layer(5, 10)
    keep = torch.tensor([7, 0, 3, 4])  # any order is kept
    weight, bias = refit(*dense, *statistics(x), keep=keep, damp=0.0)
    design = torch.cat([x[keep], torch.ones(1, 200, dtype=torch.float64)]).T
    want = torch.linalg.lstsq(design, (dense[0] @ x + dense[1][:, None]).T).solution.T
    torch.testing.assert_close(weight, want[:, :-1])
    torch.testing.assert_close(bias, want[:, -1])


def test_closed_form_equals_the_running_updates() -> None:
    x = sample(24, 300)
    gram, (weight, bias) = x @ x.T, layer(6, 24)
    left = list(range(24))
    loop = eliminate_plainly(weight, gram, unit_columns=torch.arange(24)[:, None], damp=1e-2)
    for unit, running in loop:
        left.remove(unit)
        keep = torch.tensor(left, dtype=torch.long)
        closed, _ = refit(weight, bias, gram, torch.zeros(24), keep=keep, damp=1e-2)
        torch.testing.assert_close(closed, running[:, keep], rtol=1e-9, atol=1e-9)


def test_keeping_everything_changes_nothing() -> None:
    x, (weight, bias) = sample(8, 50), layer(3, 8)
    same = refit(weight.float(), bias.float(), *statistics(x), keep=torch.arange(8))
    assert torch.equal(same[0], weight.float())
    assert torch.equal(same[1], bias.float())


@pytest.mark.parametrize("name", ["least_squares", "bias"])
def test_keeping_nothing_leaves_the_mean_output(name: str) -> None:
    x, dense = sample(8, 50), layer(3, 8)
    weight, bias = COMPENSATORS[name](*dense, *statistics(x), keep=torch.empty(0, dtype=torch.long))
    assert weight.shape == (3, 0)
    torch.testing.assert_close(bias, (dense[0] @ x + dense[1][:, None]).mean(dim=1))


def test_a_bias_is_made_where_there_was_none() -> None:
    x, (weight, _) = sample(8, 500), layer(3, 8)
    keep = torch.tensor([1, 2, 5])
    small = refit(weight, None, *statistics(x), keep=keep)
    mean_gap = (weight @ x).mean(dim=1) - (small[0] @ x[keep]).mean(dim=1) - small[1]
    assert mean_gap.abs().max() < 1e-9


def test_each_compensator_repairs_more_than_the_one_before() -> None:
    x, dense, keep = sample(16, 400), layer(8, 16), torch.arange(0, 16, 2)
    gram, mean = statistics(x)
    errors = [
        output_error(x, dense, COMPENSATORS[name](*dense, gram, mean, keep=keep), keep)
        for name in ("none", "bias", "least_squares")
    ]
    assert errors[0] > errors[1] > errors[2]


def test_singular_statistics_still_give_a_finite_refit() -> None:
    x = sample(20, 5)  # fewer tokens than columns
    weight, bias = refit(*layer(4, 20), *statistics(x), keep=torch.arange(15))
    assert weight.isfinite().all()
    assert bias.isfinite().all()


def test_indefinite_matrix_is_lifted_by_its_least_eigenvalue() -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0, -3.0], dtype=torch.float64))
    lower, shift = damped_cholesky(gram, 1e-2, scale=1.0)
    assert shift == pytest.approx(3.01)
    torch.testing.assert_close(lower @ lower.T, gram + shift * torch.eye(3))


def test_damping_grows_tenfold_until_the_factor_exists() -> None:
    gram = torch.diag(torch.tensor([1.0, -0.005], dtype=torch.float64))
    assert damped_cholesky(gram, 1e-4, scale=1.0)[1] == pytest.approx(1e-2)


@pytest.mark.parametrize("keep", [torch.tensor([1, 1]), torch.tensor([True, False, True])])
def test_doubtful_column_lists_are_refused(keep: Tensor) -> None:
    with pytest.raises((TypeError, ValueError), match="keep"):
        refit(torch.ones(2, 3), None, torch.eye(3), torch.zeros(3), keep=keep)
