"""Matrix products of the compile itself, through the faster of the two libraries torch carries.

Plain fp32 `linear` goes to MKL, which on AMD processors runs at less than half of what oneDNN
reaches (measured: 120 against 269 GFLOP/s on one Zen core). Both are fp32; they differ in rounding.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b; x (..., in), weight (out, in)."""
    if x.dtype == torch.float32 and x.numel() and weight.numel() and _has_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.contiguous(), weight.contiguous(), bias, "none", [], ""
        )
        return product
    return torch.nn.functional.linear(x, weight, bias)


def second_moment(rows: Tensor) -> Tensor:
    """rows' rows; rows (n, d) -> (d, d) in fp64."""
    own = _centred(rows)
    return _moment(own, own)


def cross_moment(left: Tensor, right: Tensor) -> Tensor:
    """left' right; left (n, p), right (n, q) -> (p, q) in fp64.

    The product is fp32 and of deviations from the mean, what the means add is fp64: columns that
    hardly vary keep their covariance, which would drown in the rounding of their squared means.
    """
    return _moment(_centred(left), _centred(right))


def _centred(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations (d, n) from a shift near the mean; the shift (d,) and the total (d,) in fp64."""
    total = rows.sum(0, dtype=torch.float64)
    shift = total.div(max(1, len(rows))).to(rows.dtype)
    return (rows - shift).T.contiguous(), shift.double(), total


def _moment(left: tuple[Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """left' right, of what `_centred` gives of both."""
    (deviations, shift, total), (other, other_shift, other_total) = left, right
    moment = linear(deviations, other).double().addr_(shift, other_total)
    return moment.addr_(total - deviations.shape[1] * shift, other_shift)


@functools.cache
def _has_onednn() -> bool:
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available) and hasattr(torch.ops.mkldnn, "_linear_pointwise")
