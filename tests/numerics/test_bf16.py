"""bf16: rounding as the format says, and a map that computes what its kernels do."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from zipc.numerics.bf16 import Bf16Linear, converted, rounded


def test_rounding_is_to_the_nearest_and_ties_go_to_even() -> None:
    x = torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,))
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8])
    got = rounded(x)
    assert got[:4].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]
    want = x.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(got.numpy(), want)
    assert ((got - x).abs() <= 2**-8 * x.abs()).all()


def test_inputs_are_rounded_up_only_where_the_last_bit_is_odd() -> None:
    step = 2**-7
    x = torch.tensor([1 + 0.9 * step, 1 + 1.5 * step, 1 + 1.4 * step, -1 - 1.6 * step, 0.0])
    want = torch.tensor([1, 1 + 2 * step, 1 + step, -1 - 2 * step, 0.0])
    assert torch.equal(converted(x), want)
    assert torch.equal(converted(x.double()), want.double())


def test_inputs_weights_and_products_are_rounded_and_the_bias_is_not() -> None:
    made = Bf16Linear(2, 1, bias=True)
    made.weight.copy_(torch.tensor([[1.0, 1.0]]))
    made.bias.data.fill_(2**-12)  # lost if it were added before rounding
    assert made(torch.tensor([[1 + 2**-10, 0.0]])).item() == 1 + 2**-12  # the input is rounded
    assert made(torch.tensor([[1.0, 2**-8]])).item() == 1 + 2**-12  # and so is the product
    made.weight.copy_(torch.tensor([[1 + 2**-10, 0.0]]))
    assert made(torch.tensor([[1.0, 1.0]])).item() == 1 + 2**-12
    assert made.state_dict()["weight"].dtype == torch.bfloat16
