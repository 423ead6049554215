"""INT4 weights have a scale for every block of inputs, and error feedback knows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zipc.numerics.int4 import BLOCK, INT4, LIMIT
from zipc.numerics.int8 import Int8Linear, quantize_weight

widths = pytest.mark.parametrize("width", [1, 8, BLOCK, 40, 64, 96, 150])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded_by_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales, one block of one row after another."""
    values, scales = [], []
    for row in weight:
        blocks = row.split(BLOCK)
        steps = [max(float(b.abs().max()), 1e-12) / LIMIT for b in blocks]
        values.append(torch.cat([(b / s).round() for b, s in zip(blocks, steps, strict=True)]))
        scales.append(steps)
    return torch.stack(values).to(torch.int8), torch.tensor(scales)


@widths
def test_every_block_of_every_row_is_rounded_by_itself(width: int) -> None:
    weight = drawn(12, width) * drawn(12, 1, seed=1).exp()
    rounded = quantize_weight(weight, numeric=INT4)
    values, scales = rounded_by_blocks(weight)
    assert torch.equal(rounded.values, values)
    torch.testing.assert_close(rounded.scale, scales)
    each = torch.cat([s.expand(-1, BLOCK) for s in scales.split(1, 1)], 1)[:, :width]
    torch.testing.assert_close(rounded.dequantized(), values * each)
    assert bool(((rounded.dequantized() - weight).abs() <= 0.5001 * each).all())


@widths
def test_what_four_bits_hold_is_held_exactly(width: int) -> None:
    held = torch.randint(-LIMIT, LIMIT + 1, (6, width), generator=torch.Generator().manual_seed(2))
    held[:, ::BLOCK] = LIMIT  # every block reaches its largest
    weight = quantize_weight(held * 0.25, numeric=INT4).dequantized()
    torch.testing.assert_close(weight, held * 0.25, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [24, 64, 150])
def test_error_feedback_has_less_output_error_than_rounding(width: int) -> None:
    weight = drawn(20, width, seed=width)
    x = drawn(400, width, seed=3) @ drawn(width, width, seed=4) / width**0.5 + drawn(400, 1)
    plain = quantize_weight(weight, numeric=INT4)
    fed = quantize_weight(weight, numeric=INT4, gram=x.double().T @ x.double())
    assert int(fed.values.abs().max()) <= LIMIT
    before, after = (float(((r.dequantized() - weight) @ x.T).square().sum()) for r in (plain, fed))
    assert after < 0.8 * before


@pytest.mark.parametrize("width", [90, 128])
def test_feedback_is_the_column_by_column_form(width: int) -> None:
    """The published loop, without chunks: a block's scale is that of what is left of it when its
    first column is reached."""
    weight = drawn(6, width, seed=5)
    x = (drawn(300, width, seed=6) @ drawn(width, width, seed=7)).double()
    gram = x.T @ x
    fed = quantize_weight(weight, numeric=INT4, gram=gram)
    damped = gram + torch.eye(width) * (1e-2 * gram.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    W, want, scale = weight.double(), torch.zeros(6, width), torch.zeros(6)
    for j in range(width):
        if j % BLOCK == 0:
            scale = W[:, j : j + BLOCK].abs().amax(1) / LIMIT
            torch.testing.assert_close(fed.scale[:, j // BLOCK].double(), scale, rtol=1e-3, atol=0)
        want[:, j] = (W[:, j] / scale).round().clamp(-LIMIT, LIMIT)
        error = (W[:, j] - want[:, j] * scale) / upper[j, j]
        W = W - error[:, None] * upper[j][None] * (torch.arange(width) >= j)
    assert float((want != fed.values).double().mean()) < 0.01


@pytest.mark.parametrize("fed", [False, True])
def test_zeros_stay_and_set_no_scale(fed: bool) -> None:
    weight = drawn(8, 96, seed=8)
    weight[:, torch.arange(96) % 4 > 1] = 0.0
    weight[:, 32:64] = 0.0
    x = drawn(200, 96, seed=9) + drawn(200, 1, seed=10)
    rounded = quantize_weight(weight, numeric=INT4, gram=x.T @ x if fed else None)
    assert not rounded.values[weight == 0].any()
    assert bool((rounded.scale[:, 1] < 1e-10).all())
    assert bool((rounded.values.abs().amax(1) == LIMIT).all())


def test_empty_widths_round_to_nothing() -> None:
    assert quantize_weight(torch.zeros(3, 0), numeric=INT4).dequantized().shape == (3, 0)


@pytest.mark.parametrize("bias", [True, False])
def test_its_linear_map_leaves_activations_alone(bias: bool) -> None:
    weight, x = drawn(7, 40, seed=11), drawn(3, 5, 40, seed=12)
    rounded = quantize_weight(weight, numeric=INT4)
    linear = Int8Linear(40, 7, bias=bias, numeric=INT4)
    state = {"weight": rounded.values, "weight_scale": rounded.scale}
    linear.load_state_dict(state | ({"bias": drawn(7)} if bias else {}))
    want = torch.nn.functional.linear(x, rounded.dequantized(), drawn(7) if bias else None)
    torch.testing.assert_close(linear(x), want)
