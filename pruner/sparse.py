"""2:4 in the weights of maps: which of them sparse kernels take, and what becomes of those."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zipc.numerics.pattern import obstacle
from zipc.numerics.sparsity import sparsify
from zipc.pruner.compensate.least_squares import center
from zipc.pruner.graph.trace import MapCall
from zipc.pruner.maps import bias_of_rows, matrices, own_layout


def refusal(call: MapCall, shape: Sequence[int], *, integer: bool) -> str | None:
    """Why sparse kernels do not take a map whose weight has such a shape; None if they do."""
    if call.transposed:
        return "it is a transposed convolution"
    return obstacle(shape[call.out_dim], shape[call.in_dim], integer=integer)


def halved(call: MapCall, weight: Tensor) -> Tensor:
    """A weight of the pattern by its places alone, for prices: they do not depend on values."""
    channels = torch.arange(weight.shape[call.in_dim])
    return weight.index_fill(call.in_dim, channels[channels % 4 > 1], 0.0)


def to_pattern(
    call: MapCall,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gram: Tensor,
    total: Tensor,
    count: int,
) -> tuple[Tensor, Tensor | None]:
    """Bring a map to 2:4 so that it gives what it gave; a bias keeps the mean output.

    `gram` (groups, in, in), `total` (groups, in) and `count` are the moments of its input. A map
    without bias is fitted to the moments about zero.

    Raises:
        UsageError: weights or moments are not finite.
    """
    parts, shifts = [], []
    for W, H, x in zip(matrices(call, weight), gram, total, strict=True):  # (out, in)
        centred, mean = center(H, x, count)
        V = sparsify(W, H if bias is None else centred, taps=call.kernel, where=call.module)
        parts.append(V)
        shifts.append((W.double() - V.double()) @ mean)
    made = own_layout(call, torch.stack(parts), weight)
    if bias is None:
        return made, None
    shift = bias_of_rows(call, torch.stack(shifts), weight)
    return made, (bias.double() + shift).to(bias.dtype)
