"""Maps that are trained through their rounding compute what they will compute, and learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zipc.numerics.int4 import INT4
from zipc.numerics.int8 import DYNAMIC, STATIC, Int8Linear, activation_range, quantize_weight
from zipc.numerics.training import RoundedLinear, round_, train_through_rounding_

ROWS, COLUMNS, LIMIT = 6, 40, 63
numerics = pytest.mark.parametrize("numeric", [DYNAMIC, STATIC, INT4])


def rounded(numeric: str, weight: Tensor | None = None) -> Int8Linear:
    made = Int8Linear(COLUMNS, ROWS, bias=True, numeric=numeric)
    weight = torch.randn(ROWS, COLUMNS) if weight is None else weight
    found = quantize_weight(weight, numeric=numeric, limit=LIMIT)
    made.weight.copy_(found.values)
    made.weight_scale.copy_(found.scale)
    assert made.bias is not None
    made.bias.data.normal_()
    if numeric == STATIC:
        at = activation_range(-2.0, 2.5)
        made.input_scale.fill_(at.scale)
        made.input_zero_point.fill_(at.zero_point)
    return made


@numerics
def test_before_a_step_nothing_has_changed(numeric: str) -> None:
    model, x = nn.Sequential(rounded(numeric), nn.ReLU()), torch.randn(5, COLUMNS)
    want, state = model(x), {n: t.clone() for n, t in model.state_dict().items()}
    assert train_through_rounding_(model) == ["0"]
    torch.testing.assert_close(model(x), want)
    assert round_(model) == ["0"]
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@numerics
def test_what_is_trained_is_what_runs_afterwards(numeric: str) -> None:
    """The weights of a rounded map are brought to those of another one, through both roundings."""
    x = torch.randn(200, COLUMNS)
    wanted = x @ torch.randn(ROWS, COLUMNS).T / 4
    model = nn.Sequential(rounded(numeric))
    train_through_rounding_(model)
    before = float((model(x).detach() - wanted).square().mean())
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        (model(x) - wanted).square().mean().backward()
        optimiser.step()
    after = model(x).detach()
    assert float((after - wanted).square().mean()) < before / 20
    round_(model)
    assert isinstance(model[0], Int8Linear)
    torch.testing.assert_close(model(x), after)


def test_gradients_stop_where_a_range_ends() -> None:
    held = RoundedLinear(rounded(STATIC))
    x = torch.tensor([[0.3] * 20 + [9.0] * 10 + [-9.0] * 10], requires_grad=True)
    held(x).sum().backward()
    assert x.grad is not None
    assert (x.grad[0, :20] != 0).all()
    assert (x.grad[0, 20:] == 0).all()


def test_a_weight_beyond_its_range_stays_within_it() -> None:
    held = RoundedLinear(rounded(DYNAMIC))
    held.weight.data[0, 0] = 1e3
    held(torch.randn(3, COLUMNS)).sum().backward()
    assert held.weight.grad is not None
    assert held.weight.grad[0, 0] == 0
    assert int(held.to_int8().weight.abs().max()) == LIMIT


def test_zeros_of_a_pattern_stay() -> None:
    weight = torch.randn(ROWS, COLUMNS).abs() + 0.1
    weight.view(ROWS, -1, 4)[..., 1::2] = 0
    model = nn.Sequential(rounded(STATIC, weight))
    train_through_rounding_(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(20, COLUMNS)
    model(x).square().mean().backward()
    optimiser.step()
    after = model(x)
    round_(model)
    made = model[0]
    assert isinstance(made, Int8Linear)
    assert (made.weight.view(ROWS, -1, 4)[..., 1::2] == 0).all()
    torch.testing.assert_close(model(x), after)
