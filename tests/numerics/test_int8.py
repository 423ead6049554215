"""Rounding is what ONNX says it is, and error feedback lowers the output error."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper
from torch import Tensor

from zipc.core.errors import UsageError
from zipc.numerics.int8 import (
    DYNAMIC,
    STATIC,
    ActivationRange,
    Int8Linear,
    activation_range,
    calibrate,
    dynamic_range,
    fake_quantize_dynamic,
    fake_quantize_static,
    quantize_weight,
)


def operator(op: str, inputs: list[tuple[str, int]], outputs: list[tuple[str, int]]):  # type: ignore[no-untyped-def]
    graph = helper.make_graph(
        [helper.make_node(op, [n for n, _ in inputs], [n for n, _ in outputs])],
        "g",
        [helper.make_tensor_value_info(n, t, None) for n, t in inputs],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


F, U = TensorProto.FLOAT, TensorProto.UINT8
DYNAMIC_OPERATOR = operator("DynamicQuantizeLinear", [("x", F)], [("y", U), ("s", F), ("z", U)])
STATIC_OPERATOR = operator("QuantizeLinear", [("x", F), ("s", F), ("z", U)], [("y", U)])

values = st.floats(-1e4, 1e4, width=32).map(lambda v: 0.0 if abs(v) < 1e-5 else v)
tensors = arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=9), elements=values)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tensors)
def test_dynamic_ranges_and_values_are_those_of_the_operator(x: np.ndarray) -> None:
    q, scale, zero = DYNAMIC_OPERATOR.run(None, {"x": x})
    mine_scale, mine_zero = dynamic_range(torch.from_numpy(x))
    if x.any():
        assert float(mine_scale) == pytest.approx(float(scale), rel=1e-6)
    assert int(mine_zero) == int(zero)
    want = (q.astype(np.float32) - np.float32(zero)) * scale
    got = fake_quantize_dynamic(torch.from_numpy(x.copy())).numpy()
    # equal, but for values that lie on a rounding boundary: those may go either way, by one step
    steps = np.abs(got - want) / max(float(scale), 1e-12)
    assert steps.max() < 1.01
    assert (steps > 0.01).mean() <= 0.34 or x.size < 3


def test_dynamic_values_are_those_of_the_operator_on_ordinary_data() -> None:
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * 3 + 1
    q, scale, zero = DYNAMIC_OPERATOR.run(None, {"x": x.numpy()})
    want = (q.astype(np.float32) - np.float32(zero)) * scale
    steps = np.abs(fake_quantize_dynamic(x.clone()).numpy() - want) / scale
    assert (steps > 0.01).sum() <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tensors, st.floats(0.0078125, 100.0, width=32), st.integers(0, 255))
def test_static_values_are_those_of_the_operator(x: np.ndarray, scale: float, zero: int) -> None:
    feeds = {"x": x, "s": np.array(scale, np.float32), "z": np.array(zero, np.uint8)}
    q = STATIC_OPERATOR.run(None, feeds)[0]
    want = (q.astype(np.float32) - zero) * np.float32(scale)
    at = ActivationRange(scale, zero)
    got = fake_quantize_static(torch.from_numpy(x.copy()), at).numpy()
    assert (np.abs(got - want) / scale).max() < 1.01
    exact = np.abs(np.abs(x / np.float32(scale)) % 1 - 0.5) > 1e-3
    np.testing.assert_allclose(got[exact], want[exact], rtol=1e-6)


def test_simulations_leave_their_input_alone_and_take_empty_tensors() -> None:
    x = torch.randn(4, 5)
    before = x.clone()
    fake_quantize_dynamic(x)
    fake_quantize_static(x, activation_range(-1, 1))
    assert torch.equal(x, before)
    assert fake_quantize_dynamic(torch.zeros(0, 3)).shape == (0, 3)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_ranges_represent_zero_exactly_and_cover_both_ends(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    at = activation_range(low, high)
    assert 0 <= at.zero_point <= 255
    assert float(fake_quantize_static(torch.zeros(1), at)) == 0.0
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)])
    assert float((fake_quantize_static(ends.clone(), at) - ends).abs().max()) <= at.scale * 1.01


def correlated(width: int, rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    factors = torch.randn(rows, width, generator=generator)
    return factors @ mix + torch.randn(rows, 1, generator=generator)


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float(((weight - other) @ x.T).square().sum())


def test_rounding_is_within_half_a_step_and_symmetric() -> None:
    weight = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    for limit in (127, 63):
        rounded = quantize_weight(weight, limit=limit)
        assert rounded.values.dtype == torch.int8
        assert int(rounded.values.abs().max()) == limit
        gap = (rounded.dequantized() - weight).abs()
        assert bool((gap <= rounded.scale[:, None] * 0.5001).all())
        mirrored = quantize_weight(-weight, limit=limit)
        assert torch.equal(mirrored.values, -rounded.values)


@pytest.mark.parametrize("width", [24, 64, 150])
@pytest.mark.parametrize("limit", [127, 63])
def test_error_feedback_has_less_output_error_than_rounding(width: int, limit: int) -> None:
    weight = torch.randn(20, width, generator=torch.Generator().manual_seed(width))
    x = correlated(width, 400, seed=width)
    plain = quantize_weight(weight, limit=limit)
    fed = quantize_weight(weight, gram=(x.double().T @ x.double()), limit=limit)
    assert torch.equal(fed.scale, plain.scale)
    assert int(fed.values.abs().max()) <= limit
    before = output_error(plain.dequantized(), weight, x)
    assert output_error(fed.dequantized(), weight, x) < 0.8 * before


def test_feedback_is_the_column_by_column_form() -> None:
    """The published loop, without blocks: each error goes to all later columns at once."""
    weight = torch.randn(6, 90, generator=torch.Generator().manual_seed(3))
    x = correlated(90, 300, seed=4).double()
    gram = x.T @ x
    fed = quantize_weight(weight, gram=gram)
    damped = gram + torch.eye(90) * (1e-2 * gram.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    W = weight.double()
    scale = fed.scale.double()
    want = torch.zeros_like(W)
    for j in range(90):
        want[:, j] = (W[:, j] / scale).round().clamp(-127, 127)
        error = (W[:, j] - want[:, j] * scale) / upper[j, j]
        W = W - error[:, None] * upper[j][None] * (torch.arange(90) >= j)
    assert float((want != fed.values).double().mean()) < 0.01


def test_uncorrelated_inputs_make_feedback_plain_rounding() -> None:
    weight = torch.randn(5, 20, generator=torch.Generator().manual_seed(5))
    fed = quantize_weight(weight, gram=torch.eye(20) * 7.0)
    assert torch.equal(fed.values, quantize_weight(weight).values)


def test_degenerate_grams_are_survived_and_bad_ones_refused() -> None:
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(6))
    row = torch.randn(1, 10, generator=torch.Generator().manual_seed(7))
    for gram in (torch.zeros(10, 10), row.T @ row, torch.ones(10, 10)):
        fed = quantize_weight(weight, gram=gram)
        assert bool(torch.isfinite(fed.dequantized()).all())
    with pytest.raises(UsageError, match="NaN"):
        quantize_weight(weight, gram=torch.full((10, 10), float("nan")))


def test_rows_of_zeros_and_empty_widths_round_to_zeros() -> None:
    weight = torch.zeros(3, 4)
    assert not quantize_weight(weight).dequantized().any()
    assert quantize_weight(torch.zeros(3, 0)).values.shape == (3, 0)


def test_calibration_clips_outliers_where_that_pays_and_never_loses_to_the_full_range() -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(16, 24, generator=generator)
    x = torch.randn(500, 24, generator=generator)
    x[0, 0] = 60.0
    weight[:, 0] = 0.0  # nothing reads the outlier
    chosen = calibrate(x, weight)
    full = activation_range(float(x.min()), float(x.max()))
    assert chosen.scale < full.scale
    exact = x @ weight.T
    errors = [
        float((fake_quantize_static(x.clone(), at) @ weight.T - exact).square().sum())
        for at in (chosen, full)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_linear_is_integer_arithmetic(numeric: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(7, 18, generator=generator)
    x = torch.randn(3, 5, 18, generator=generator)
    rounded = quantize_weight(weight)
    linear = Int8Linear(18, 7, bias=bias, numeric=numeric)
    linear.weight.copy_(rounded.values)
    linear.weight_scale.copy_(rounded.scale)
    at = activation_range(-2.5, 3.0)
    if numeric == STATIC:
        linear.input_scale.fill_(at.scale)
        linear.input_zero_point.fill_(at.zero_point)
        scale, zero = torch.tensor(at.scale), torch.tensor(float(at.zero_point))
    else:
        scale, zero = dynamic_range(x)
    q = ((x / scale).round() + zero).clamp(0, 255).long() - int(zero)
    want = (q @ rounded.values.long().T).float() * scale * rounded.scale
    if bias:
        linear.bias.data = torch.randn(7, generator=generator)
        want = want + linear.bias
    torch.testing.assert_close(linear(x), want, atol=1e-4, rtol=1e-5)
    assert f"numeric={numeric}" in repr(linear)
