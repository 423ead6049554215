"""Scales moved from the channels of an input to the columns that read them, before INT8 rounding.

X W' = (X diag(s)^-1) (W diag(s))' for any s > 0, and one range for a whole input suits channels of
one size best. SmoothQuant (Xiao et al. 2023, arXiv:2211.10438), equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zipc.numerics.int8 import CALIBRATION_ROWS, calibrate, fake_quantize_static, quantize_weight

ALPHAS = (0.25, 0.5, 0.75)  # share of the difference between channels that weights take over
FLOOR = 1e-3  # of the largest channel: smaller ones are scaled like this
GAIN = 0.95  # of the squared error, at most, for factors to be worth it: less may be chance


@dataclass(frozen=True, slots=True)
class Reading:
    """An input, the rows of all maps that read it, and which factor a channel of it has."""

    x: Tensor  # (tokens, in)
    weight: Tensor  # (out, in)
    index: Tensor  # (in,), -1: none


def best_factors(
    readings: Sequence[Reading], count: int, *, limit: int, signed: bool
) -> Tensor | None:
    """The factors (count,) under which rounding changes outputs least; None if that is hardly less.

    Found and calibrated on one half of each sample, they are judged on the other, both ways: the
    largest values of the rows that factors are made of always just fit. `limit` is of integer
    weights, `signed` of activations: see `numerics.int8`.
    """
    if min(len(reading.x) for reading in readings) < 2:
        return None
    one, other = ([_half(r, i) for r in readings] for i in (0, 1))

    def lost(alpha: float | None) -> float:
        total = 0.0
        for seen, fresh in ((one, other), (other, one)):
            s = None if alpha is None else factors_of(seen, count, alpha)
            total += _error(seen, fresh, s, limit=limit, signed=signed)
        return total

    best, least = None, GAIN * lost(None)
    for alpha in ALPHAS:
        error = lost(alpha)
        if error < least:
            best, least = alpha, error
    return None if best is None else factors_of(readings, count, best)


def factors_of(readings: Sequence[Reading], count: int, alpha: float) -> Tensor:
    """The factors (count,) of all channels; 1 where nothing reads them."""
    indices = [r.index for r in readings]
    read = torch.tensor(sorted({i for index in indices for i in index.tolist() if i >= 0}))
    inputs = largest([r.x for r in readings], indices, count)[read]
    columns = largest([r.weight for r in readings], indices, count)[read]
    return torch.ones(count).index_copy(0, read, factors(inputs, columns, alpha))


def factors(inputs: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """s = inputs^alpha / columns^(1 - alpha) of the largest magnitudes (channels,) of each.

    In the unit that leaves the largest input what it was, so that no type overflows that held it.
    """
    inputs = inputs.clamp_min(max(FLOOR * float(inputs.max()), 1e-12))
    columns = columns.clamp_min(max(FLOOR * float(columns.max()), 1e-12))
    raw = inputs**alpha / columns ** (1 - alpha)
    return raw * ((inputs / raw).max() / inputs.max())


def largest(values: Sequence[Tensor], indices: Sequence[Tensor], count: int) -> Tensor:
    """The largest magnitude (count,) in the columns of each index; of all matrices (n, in)."""
    found = torch.zeros(count + 1)
    for matrix, index in zip(values, indices, strict=True):
        place = index.masked_fill(index < 0, count)
        found.scatter_reduce_(0, place, matrix.float().abs().amax(0), "amax")
    return found[:count]


def of_channels(found: Tensor, index: Tensor) -> Tensor:
    """The factor (in,) of each channel; 1 where it has none."""
    return torch.cat([found, found.new_ones(1)])[index]  # -1 is the last


def _half(reading: Reading, which: int) -> Reading:
    """The same of the first rows, or of the last: of other texts."""
    return replace(reading, x=reading.x.tensor_split(2)[which])


def _error(
    seen: Sequence[Reading],
    fresh: Sequence[Reading],
    found: Tensor | None,
    *,
    limit: int,
    signed: bool,
) -> float:
    """Squared error of the outputs on `fresh` rows when ranges are calibrated on those `seen`."""
    total = 0.0
    for own, other in zip(seen, fresh, strict=True):
        s = torch.ones(()) if found is None else of_channels(found, own.index)
        weight, x = own.weight * s, other.x[:: max(1, len(other.x) // CALIBRATION_ROWS)] / s
        at = calibrate(own.x / s, weight, signed=signed)
        rounded = quantize_weight(weight, limit=limit).dequantized()
        total += float((fake_quantize_static(x, at) @ rounded.T - x @ weight.T).square().sum())
    return total
