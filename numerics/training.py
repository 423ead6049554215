"""Training weights that will run in INT8 or INT4: rounded in the forward pass, not in the gradient.

`train_through_rounding_` puts a map with weights in floats in the place of every INT8 one of a
compiled module, `round_` puts INT8 maps back. In between the module computes what it will compute,
and any optimiser moves its weights. A rounding passes gradients on as if it were none (the
straight-through estimator: arXiv:1308.3432), but for values that lie beyond its range, whose
gradient is zero (arXiv:1712.05877). Ranges and scales stay as calibrated, and so do the zeros of a
2:4 pattern.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zipc.numerics.int4 import INT4, LIMIT
from zipc.numerics.int8 import (
    DYNAMIC,
    FULL,
    REDUCED,
    STATIC,
    ActivationRange,
    Int8Linear,
    QuantizedWeight,
    fake_quantize_dynamic,
    fake_quantize_static,
    scale_of_each,
)

HIGHEST = 255  # of U8


class RoundedLinear(nn.Module):
    """A linear map that computes what an `Int8Linear` does, and can be trained.

    weight (out, in), in floats; `kept` (out, in) is False where a pattern wants a zero.
    """

    kept: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, held: Int8Linear) -> None:
        super().__init__()
        self.numeric = held.numeric
        self.limit = LIMIT if held.numeric == INT4 else _limit(held.weight)
        exact = QuantizedWeight(held.weight, held.weight_scale).dequantized()
        self.weight = nn.Parameter(exact)
        self.bias = None if held.bias is None else nn.Parameter(held.bias.detach().clone())
        self.register_buffer("kept", _kept(held.weight))
        self.register_buffer("weight_scale", held.weight_scale.clone())
        if held.numeric == STATIC:
            self.register_buffer("input_scale", held.input_scale.clone())
            self.register_buffer("input_zero_point", held.input_zero_point.clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = scale_of_each(self.weight_scale, self.weight.shape[1])
        weight = (self.weight * self.kept).clamp(-self.limit * scale, self.limit * scale)
        weight = _as_if_exact(weight, self.rounded().dequantized())
        return nn.functional.linear(self._seen(x), weight.to(x.dtype), self.bias)

    def rounded(self) -> QuantizedWeight:
        """The weights as they stand, in integers."""
        with torch.no_grad():
            steps = self.weight / scale_of_each(self.weight_scale, self.weight.shape[1])
            values = steps.round().clamp(-self.limit, self.limit) * self.kept
        return QuantizedWeight(values.to(torch.int8), self.weight_scale)

    def to_int8(self) -> Int8Linear:
        """The map that was trained, with its weights rounded."""
        rows, columns = self.weight.shape
        made = Int8Linear(columns, rows, bias=self.bias is not None, numeric=self.numeric)
        made.weight.copy_(self.rounded().values)
        made.weight_scale.copy_(self.weight_scale)
        if made.bias is not None and self.bias is not None:
            made.bias.data.copy_(self.bias.data)
        if self.numeric == STATIC:
            made.input_scale.copy_(self.input_scale)
            made.input_zero_point.copy_(self.input_zero_point)
        return made

    def _seen(self, x: Tensor) -> Tensor:
        """The input as the product reads it."""
        if self.numeric == DYNAMIC:  # its range covers all of it
            return _as_if_exact(x, fake_quantize_dynamic(x.detach()))
        if self.numeric != STATIC:
            return x
        at = ActivationRange(float(self.input_scale), int(self.input_zero_point))
        low, high = ((end - at.zero_point) * at.scale for end in (0, HIGHEST))
        return _as_if_exact(x.clamp(low, high), fake_quantize_static(x.detach(), at))


def train_through_rounding_(model: nn.Module) -> list[str]:
    """Make every INT8 or INT4 map of a module trainable, in place; returns their paths."""
    paths = [path for path, held in model.named_modules() if isinstance(held, Int8Linear)]
    for path in paths:
        held = model.get_submodule(path)
        assert isinstance(held, Int8Linear)
        model.set_submodule(path, RoundedLinear(held))
    return paths


def round_(model: nn.Module) -> list[str]:
    """Put INT8 and INT4 maps back, with the weights that were trained; returns their paths."""
    paths = [path for path, held in model.named_modules() if isinstance(held, RoundedLinear)]
    for path in paths:
        held = model.get_submodule(path)
        assert isinstance(held, RoundedLinear)
        model.set_submodule(path, held.to_int8())
    return paths


def _as_if_exact(exact: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded` with the gradient of `exact`."""
    return exact + (rounded - exact).detach()


def _limit(values: Tensor) -> int:
    """The largest integer that weights were rounded to: a processor may want small ones."""
    return REDUCED if values.numel() and int(values.abs().max()) <= REDUCED else FULL


def _kept(values: Tensor) -> Tensor:
    """Where (out, in) may be other than zero: everywhere, or at two of four where all rows are
    2:4."""
    rows, columns = values.shape
    if columns % 4 or not values.any():
        return torch.ones_like(values, dtype=torch.bool)
    sparse = bool(((values.reshape(rows, -1, 4) != 0).sum(-1) <= 2).all())
    return values != 0 if sparse else torch.ones_like(values, dtype=torch.bool)
