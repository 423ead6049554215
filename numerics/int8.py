"""INT8: symmetric S8 weights per output channel, U8 activations per tensor; and INT4 weights.

Formulas follow ONNX `DynamicQuantizeLinear` and `QuantizeLinear`, so that the torch simulation
and the ONNX graph agree to rounding. Error feedback is GPTQ (arXiv:2210.17323): a column's rounding
error is spread over the columns not yet rounded through the Cholesky factor of the inverse Gram.
INT4 weights (`numerics.int4`) are rounded the same way, with a scale for every block of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zipc.numerics.int4 import BLOCK, INT4, LIMIT
from zipc.numerics.inverse import inverse_factor
from zipc.numerics.ranges import candidate_ranges

DYNAMIC = "int8-dynamic"
STATIC = "int8-static"
FULL, REDUCED = 127, 63  # largest weight; the smaller one where U8 x S8 products saturate
CALIBRATION_ROWS = 512  # rows that every range is tried on


@dataclass(frozen=True, slots=True)
class ActivationRange:
    """U8 parameters of one activation tensor: x ~ scale * (q - zero_point)."""

    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """W ~ values * scale, with a scale for every row, or for every block of `BLOCK` columns."""

    values: Tensor  # int8 (out, in)
    scale: Tensor  # float32 (out,) or (out, blocks)

    def dequantized(self) -> Tensor:
        return self.values.to(torch.float32) * scale_of_each(self.scale, self.values.shape[1])


def scale_of_each(scale: Tensor, columns: int) -> Tensor:
    """(out,) -> (out, 1), (out, blocks) -> (out, columns)."""
    if scale.dim() == 1:
        return scale[:, None]
    return scale.repeat_interleave(BLOCK, dim=1)[:, :columns]


def quantize_weight(
    weight: Tensor,
    *,
    numeric: str = DYNAMIC,
    gram: Tensor | None = None,
    limit: int = FULL,
    damp: float = 1e-2,
) -> QuantizedWeight:
    """Round (out, in) as a numeric stores it; with `gram` (in, in) feed rounding errors forward.

    INT8 lies in [-limit, limit]; `limit` is 63 on processors whose U8 x S8 dot product saturates in
    16 bits (no VNNI). The scale of a block in INT4 is fixed when its first column is reached, from
    weights that hold the errors of the blocks before. What is 0 stays 0: a sparsity pattern
    survives.
    """
    W = weight.to(torch.float32)  # (out, in)
    columns = W.shape[1]
    limit, block = (LIMIT, BLOCK) if numeric == INT4 else (limit, max(columns, 1))
    scales = W.new_ones(len(W), max(-(-columns // block), 1))  # (out, blocks)
    scale = scales if numeric == INT4 else scales[:, 0]
    if gram is None or columns < 2:
        for j in range(0, columns, block):
            scales[:, j // block] = _step(W[:, j : j + block], limit)
        values = (W / scale_of_each(scale, columns)).round().clamp(-limit, limit)
        return QuantizedWeight(values.to(torch.int8), scale)
    upper = inverse_factor(gram, damp)  # (in, in), U with U'U = H^-1
    zero = W == 0
    W = W.clone()
    values = torch.zeros_like(W)
    chunk = 64  # columns between two matrix products; a multiple of BLOCK
    for start in range(0, columns, chunk):
        stop = min(start + chunk, columns)
        errors = torch.zeros(W.shape[0], stop - start)
        for j in range(start, stop):
            if j % block == 0:
                left = W[:, j : j + block].masked_fill(zero[:, j : j + block], 0.0)
                scales[:, j // block] = _step(left, limit)
            step = scales[:, j // block]
            q = (W[:, j] / step).round().clamp(-limit, limit)
            q.masked_fill_(zero[:, j], 0.0)
            values[:, j] = q
            error = (W[:, j] - q * step) / upper[j, j]
            W[:, j:stop] -= error[:, None] * upper[j, j:stop][None]
            errors[:, j - start] = error
        W[:, stop:] -= errors @ upper[start:stop, stop:]
    return QuantizedWeight(values.to(torch.int8), scale)


def _step(weight: Tensor, limit: int) -> Tensor:
    """The scale (out,) by which the largest of each row becomes `limit`."""
    return weight.abs().amax(dim=1).clamp_min(1e-12) / limit


def dynamic_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of `DynamicQuantizeLinear`."""
    low, high = torch.aminmax(x)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-30)
    zero = (-low / scale).round().clamp(0, 255)
    return scale, zero


def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """x rounded to U8 with the range of the whole tensor, as floats."""
    if x.numel() == 0:
        return x
    scale, zero = dynamic_range(x)
    return (x / scale).round_().add_(zero).clamp_(0, 255).sub_(zero).mul_(scale)


def fake_quantize_static(x: Tensor, at: ActivationRange) -> Tensor:
    """x rounded to U8 with a calibrated range, as floats."""
    q = (x / at.scale).round_().add_(at.zero_point).clamp_(0, 255)
    return q.sub_(at.zero_point).mul_(at.scale)


def activation_range(low: float, high: float) -> ActivationRange:
    """U8 parameters covering [min(low, 0), max(high, 0)]."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, 1e-12)
    return ActivationRange(scale, int(min(max(round(-low / scale), 0), 255)))


def symmetric(at: ActivationRange) -> ActivationRange:
    """The symmetric range that covers another, for runtimes whose integers are all S8.

    Its zero point in U8 is 128, so that q - 128 is the S8 value and 0 its zero point.
    """
    largest = at.scale * max(at.zero_point, 255 - at.zero_point)
    return ActivationRange(largest / 127, 128)


def calibrate(x: Tensor, weight: Tensor, *, signed: bool = False) -> ActivationRange:
    """Choose the range that gives the least output error of `weight` on sample `x`.

    x (tokens, in), weight (out, in). Tries every way of `candidate_ranges`, and judges each on
    tokens spread over the sample. `signed` asks for symmetric ranges.
    """
    ranges = candidate_ranges(x)
    x = x[:: max(1, len(x) // CALIBRATION_ROWS)]
    exact = x @ weight.T

    def made(low: float, high: float) -> ActivationRange:
        at = activation_range(low, high)
        return symmetric(at) if signed else at

    def error(at: ActivationRange) -> float:
        return float((fake_quantize_static(x.clone(), at) @ weight.T - exact).square().sum())

    return min((made(*ends) for ends in dict.fromkeys(ranges.values())), key=error)


class Int8Linear(nn.Module):
    """A linear map that computes what the ONNX integer kernels compute, in floats.

    Holds its weights as bytes, those in INT4 too. `numeric` says whether activations are quantised
    with the range of each batch, with a calibrated one (`input_scale`, `input_zero_point`), or not.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool, numeric: str) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.numeric = numeric
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        blocks = [-(-in_features // BLOCK)] if numeric == INT4 else []
        self.register_buffer("weight_scale", torch.ones(out_features, *blocks))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if numeric == STATIC:
            self.register_buffer("input_scale", torch.ones(()))
            self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.numeric == STATIC:
            at = ActivationRange(float(self.input_scale), int(self.input_zero_point))
            x = fake_quantize_static(x, at)
        elif self.numeric == DYNAMIC:
            x = fake_quantize_dynamic(x)
        weight = QuantizedWeight(self.weight, self.weight_scale).dequantized()
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, numeric={self.numeric}"
