"""Linear maps and convolutions as matrices: what OBS, refits and Gram matrices work on.

A map with weights in any layout becomes one matrix (out, in) per group. The columns of a
convolution are its input channels times its taps, and its rows of data are patches. A transposed
convolution is read from its input side: every input channel feeds all taps of all outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from zipc.pruner.graph.trace import MapCall


def matrices(call: MapCall, weight: Tensor) -> Tensor:
    """Weights in their own layout -> (groups, out, in)."""
    if call.transposed:
        grouped = weight.reshape(call.groups, len(weight) // call.groups, -1)
        return grouped.transpose(1, 2)  # (groups, out x taps, in)
    if call.convolution:
        return weight.reshape(call.groups, len(weight) // call.groups, -1)
    return (weight if call.out_dim == 0 else weight.T)[None]


def own_layout(call: MapCall, matrix: Tensor, like: Tensor) -> Tensor:
    """(groups, out, in) -> weights in their own layout; the taps are those of the weight `like`."""
    taps = like.shape[2:]
    if call.transposed:
        back = matrix.transpose(1, 2).flatten(0, 1)  # (in, out x taps)
        return back.reshape(len(back), -1, *taps)
    if call.convolution:
        rows = matrix.flatten(0, 1)
        return rows.reshape(len(rows), rows.shape[1] // taps.numel(), *taps)
    return matrix[0] if call.out_dim == 0 else matrix[0].T.contiguous()


def bias_of_rows(call: MapCall, shift: Tensor, like: Tensor) -> Tensor:
    """A value per matrix row (groups, out) -> a bias (out,)."""
    if call.transposed:  # a bias serves all taps alike
        return shift.reshape(len(shift), like.shape[1], -1).mean(-1).flatten()
    return shift.flatten()


def row_count(call: MapCall, x: Tensor) -> int:
    """How many rows of data the input of a map holds."""
    if not call.convolution:
        return x.numel() // x.shape[-1]
    if call.transposed:
        return x.numel() // x.shape[1]
    count = len(x)
    for n, (k, s, p, d) in zip(x.shape[2:], call.window or (), strict=True):
        count *= (n + 2 * p - d * (k - 1) - 1) // s + 1
    return count


def input_rows(call: MapCall, x: Tensor, pick: Tensor) -> Tensor:
    """Chosen rows of what a map reads: (rows picked, groups x in)."""
    if not call.convolution:
        return x.flatten(0, -2)[pick]
    if call.transposed:
        return x.movedim(1, -1).flatten(0, -2)[pick]
    view = F.pad(x, [p for _, _, p, _ in reversed(call.window or ()) for _ in range(2)])
    for axis, (k, s, _, d) in enumerate(call.window or (), start=2):
        view = view.unfold(axis, d * (k - 1) + 1, s)  # windows of each axis behind all others
    spatial = x.dim() - 2
    places = torch.unravel_index(pick, [len(x), *view.shape[2 : 2 + spatial]])
    taken = view.movedim(1, spatial + 1)[places]  # (rows, channels, *spans)
    for axis, (_, _, _, d) in enumerate(call.window or (), start=2):
        taken = taken[(slice(None),) * axis + (slice(None, None, d),)]
    return taken.flatten(1)


def output_rows(call: MapCall, y: Tensor, pick: Tensor) -> Tensor:
    """The same rows of what a map gives: (rows picked, out)."""
    if not call.convolution:
        return y.flatten(0, -2)[pick]
    return y.movedim(1, -1).flatten(0, -2)[pick]
