"""2:4 weights have the pattern, and each step of making them lowers the output error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zipc.core.errors import UsageError
from zipc.numerics.pattern import conforms
from zipc.numerics.sparsity import METHODS, SWEEP_DAMP, largest, refit, sparsegpt, sparsify

OUT, IN = 24, 96


def layer(seed: int = 0, *, width: int = IN) -> tuple[Tensor, Tensor]:
    """Weights (out, in) and the second moments of correlated inputs of uneven size."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 2, width, generator=rng)
    x = torch.randn(400, width // 2, generator=rng) @ mix
    x = (x + 0.3 * torch.randn(400, width, generator=rng)) * torch.rand(width, generator=rng)
    return torch.randn(OUT, width, generator=rng), (x.T @ x).double()


def error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    lost = (weight - other).double()
    return float((lost @ gram * lost).sum() / (weight.double() @ gram * weight).sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8)])
def test_exactly_n_of_every_m_are_kept(method: str, kept: int, of: int) -> None:
    weight, gram = layer()
    for made in (
        METHODS[method](weight, gram, kept=kept, of=of),
        sparsify(weight, gram, pattern=f"{kept}:{of}", method=method),
    ):
        assert ((made != 0).unflatten(1, (-1, of)).sum(-1) == kept).all()


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_have_the_pattern_stay_as_they_are(method: str) -> None:
    weight, gram = layer()
    once = sparsify(weight, gram, method=method)
    assert torch.equal(sparsify(once, gram, method=method), once)


def test_the_largest_of_each_group_stay() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1, 0.0, -0.3, 0.2]])
    assert (weight * largest(weight.abs(), kept=2, of=4)).tolist() == [
        pytest.approx([0.0, -4.0, 3.0, 0.0, 0.0, 0.0, -0.3, 0.2])
    ]


def test_sparsegpt_on_uncorrelated_inputs_is_magnitude_scaled_by_them() -> None:
    weight, _ = layer()
    gram = torch.diag(torch.rand(IN, dtype=torch.float64) * 9 + 0.1)
    scale = (gram.diagonal() + SWEEP_DAMP * gram.diagonal().mean()).float().sqrt()
    want = weight * largest((weight * scale).abs(), kept=2, of=4)
    assert torch.equal(sparsegpt(weight, gram, kept=2, of=4), want)
    assert torch.equal(METHODS["wanda"](weight, torch.eye(IN), kept=2, of=4), want_plain(weight))


def want_plain(weight: Tensor) -> Tensor:
    return METHODS["magnitude"](weight, torch.eye(IN), kept=2, of=4)


def test_sparsegpt_is_the_textbook_loop() -> None:
    """OBS on one row after another: prune, repair all later columns, factor what is left anew."""
    weight, gram = layer(3, width=16)
    H = gram + SWEEP_DAMP * gram.diagonal().mean() * torch.eye(16)
    rows = []
    for row in weight.double():
        w = row.clone()
        for start in range(0, 16, 4):
            # the cost of column j once all before it are fixed is w_j^2 / [(H_j:j:)^-1]_00
            costs = {
                j: float(w[j] ** 2 / H[j:, j:].inverse()[0, 0]) for j in range(start, start + 4)
            }
            gone = sorted(costs, key=lambda j: costs[j])[:2]
            for j in sorted(gone):
                inverse = H[j:, j:].inverse()
                w[j:] -= w[j] / inverse[0, 0] * inverse[0]
                w[j] = 0.0
        rows.append(w)
    found = sparsegpt(weight, gram, kept=2, of=4).double()
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_data_and_feedback_and_refit_each_lower_the_error(seed: int) -> None:
    weight, gram = layer(seed)
    plain = {n: error(weight, m(weight, gram, kept=2, of=4), gram) for n, m in METHODS.items()}
    fitted = {n: error(weight, sparsify(weight, gram, method=n), gram) for n in METHODS}
    assert plain["sparsegpt"] < plain["wanda"] < plain["magnitude"]
    assert all(fitted[name] < plain[name] for name in METHODS)
    assert fitted["sparsegpt"] < min(fitted["wanda"], fitted["magnitude"])


def test_refit_is_least_squares_on_every_rows_own_mask() -> None:
    weight, gram = layer(1)
    sparse = METHODS["magnitude"](weight, gram, kept=2, of=4)
    found = error(weight, refit(weight, sparse, gram), gram)
    exact = torch.zeros_like(weight, dtype=torch.float64)
    for row, mask in enumerate(sparse != 0):
        inner = gram[mask][:, mask]
        exact[row, mask] = torch.linalg.solve(inner, gram[mask] @ weight[row].double())
    least, start = error(weight, exact, gram), error(weight, sparse, gram)
    assert least <= found < least + 0.1 * (start - least)


def test_channels_of_a_convolution_are_grouped_at_each_kernel_position() -> None:
    channels, taps = 16, 9
    weight, gram = layer(2, width=channels * taps)
    made = sparsify(weight, gram, taps=taps)
    assert conforms(made.reshape(OUT, channels, 3, 3).numpy(), axis=1)
    order = torch.arange(channels * taps).view(channels, taps).T.flatten()
    alone = sparsify(weight[:, order], gram[order][:, order])
    assert torch.equal(made[:, order], alone)


def test_dead_channels_give_way_to_live_ones() -> None:
    weight, gram = layer()
    dead = torch.arange(0, IN, 4)
    gram[dead], gram[:, dead] = 0.0, 0.0
    weight[:, dead] *= 3.0  # large, and for nothing
    made = sparsify(weight, gram)
    assert made[:, dead].count_nonzero() == 0
    assert error(weight, made, gram) < error(
        weight, sparsify(weight, gram, method="magnitude"), gram
    )


def test_without_any_live_input_the_result_is_finite_and_has_the_pattern() -> None:
    weight, _ = layer()
    made = sparsify(weight, torch.zeros(IN, IN))
    assert made.isfinite().all()
    assert conforms(made.numpy(), axis=1)


def test_a_width_that_is_no_multiple_of_four_is_an_error_with_its_place() -> None:
    weight, gram = layer(width=90)
    with pytest.raises(UsageError, match=r"layer\.3\.dense has 90 input channels.*groups of 4"):
        sparsify(weight, gram, where="layer.3.dense")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", ["weights", "calibration input"])
def test_values_that_are_not_finite_are_an_error_with_their_place(
    spoilt: str, value: float
) -> None:
    weight, gram = layer()
    (weight if spoilt == "weights" else gram)[3, 5] = value
    with pytest.raises(UsageError, match=rf"The {spoilt} of layer\.3\.dense hold NaN or infinity"):
        sparsify(weight, gram, where="layer.3.dense")
