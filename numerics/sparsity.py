"""n:m sparsity: which weights of each group of input channels go, and what the others become.

A weight is a matrix (out, in) whose columns are input channels times kernel positions. Methods see
the columns of one kernel position after another, so that groups are consecutive columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from zipc.core.errors import UsageError
from zipc.numerics.inverse import inverse_factor
from zipc.numerics.pattern import parse_pattern

SWEEP_DAMP = 1e-2  # of the mean diagonal, as in SparseGPT
REFIT_DAMP = 1e-3
REFIT_STEPS = 16
BLOCK = 64  # columns between two matrix products; a multiple of every group size in use


class Method(Protocol):
    """Zeroes all but `kept` of each `of` consecutive columns of weight (out, in), row by row.

    `gram` (in, in) are the second moments of the input, centred or not.
    """

    def __call__(self, weight: Tensor, gram: Tensor, *, kept: int, of: int) -> Tensor: ...


def sparsify(
    weight: Tensor,
    gram: Tensor,
    *,
    pattern: str = "2:4",
    taps: int = 1,
    method: str = "sparsegpt",
    where: str = "the weight",
) -> Tensor:
    """Bring (out, channels x taps) to a pattern and refit what is kept; fp32.

    `gram` has the same columns. The error minimised is `||(W - V) X||^2`. A weight that has the
    pattern comes back as it is.

    Raises:
        UsageError: channels do not divide into groups, or values are not finite; names `where`.
    """
    kept, of = parse_pattern(pattern)
    channels = weight.shape[1] // taps
    if channels % of:
        raise UsageError(
            f"{where} has {channels} input channels, which do not divide into groups of {of}: "
            f"{pattern} is not for it. Leave it dense."
        )
    for values, what in ((weight, "weights"), (gram, "calibration input")):
        if not bool(torch.isfinite(values.sum())):  # NaN and infinity survive a sum
            raise UsageError(
                f"The {what} of {where} hold NaN or infinity. Check the model in fp32 on --data."
            )
    order = torch.arange(weight.shape[1]).view(channels, taps).T.flatten()
    W, H = weight[:, order].float(), gram[order][:, order]
    found = torch.empty_like(W)
    found[:, order] = refit(W, METHODS[method](W, H, kept=kept, of=of), H)
    return found


def sparsegpt(weight: Tensor, gram: Tensor, *, kept: int, of: int) -> Tensor:
    """One sweep over the columns; what each pruned weight did goes to those not yet seen.

    Frantar & Alistarh 2023, algorithm 1: a weight's cost is `w_j^2 / U_jj^2` with U the factor of
    the inverse Gram matrix, taken when its group is reached, from the weights as they are then.
    """
    W = weight.float().clone()  # (out, in)
    upper = inverse_factor(gram, SWEEP_DAMP)  # (in, in), U'U = H^-1
    costs = upper.diagonal().square().masked_fill(gram.diagonal() == 0, torch.inf)  # dead go first
    for start in range(0, W.shape[1], BLOCK):
        stop = min(start + BLOCK, W.shape[1])
        errors = W.new_zeros(W.shape[0], stop - start)
        for j in range(start, stop):
            if j % of == 0:
                group = slice(j, j + of)
                mask = largest(W[:, group].square() / costs[group], kept=kept, of=of)
            pruned = W[:, j].masked_fill(mask[:, j % of], 0.0)
            error = pruned / upper[j, j]
            W[:, j:stop].addr_(error, upper[j, j:stop], alpha=-1)
            W[:, j].masked_fill_(~mask[:, j % of], 0.0)
            errors[:, j - start] = error
        W[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return W


def wanda(weight: Tensor, gram: Tensor, *, kept: int, of: int) -> Tensor:
    """Keep the largest `|w| ||x||` of each group as they are (Sun et al. 2024)."""
    scores = weight.float().square() * gram.diagonal().float()
    return weight.float() * largest(scores, kept=kept, of=of)


def magnitude(weight: Tensor, gram: Tensor, *, kept: int, of: int) -> Tensor:
    """Keep the largest weights of each group as they are; reads no data."""
    return weight.float() * largest(weight.float().square(), kept=kept, of=of)


METHODS: Mapping[str, Method] = MappingProxyType(
    {"sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude}
)


def largest(scores: Tensor, *, kept: int, of: int) -> Tensor:
    """Mask (out, in) of the `kept` largest scores of each `of` columns; of equals, the first."""
    grouped = scores.reshape(len(scores), -1, of)
    best = grouped.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True).flatten(1)


def refit(dense: Tensor, sparse: Tensor, gram: Tensor) -> Tensor:
    """Fit what is not zero in `sparse` (out, in) to the output of `dense`; zeros stay.

    SparseGPT freezes a column once it has passed it, and the others fit nothing. Every row has a
    mask of its own, so the normal equations are solved by conjugate gradients with a diagonal
    preconditioner, all rows at once; each step lowers `||(W - V) X||^2 + damp ||W - V||^2`.
    """
    H = gram.float().clone()
    scale = H.diagonal().mean().clamp_min(1e-30)
    H.div_(scale).diagonal().add_(REFIT_DAMP)
    mask, inverse = sparse != 0, 1 / H.diagonal()
    found = sparse.float().clone()
    residual = ((dense.float() - found) @ H) * mask
    step = residual * inverse
    power = (residual * step).sum(1)
    for _ in range(REFIT_STEPS):
        turned = (step @ H) * mask
        length = power / (step * turned).sum(1).clamp_min(1e-30)
        found.addcmul_(step, length[:, None])
        residual.addcmul_(turned, length[:, None], value=-1)
        scaled = residual * inverse
        before, power = power, (residual * scaled).sum(1)
        step = scaled.addcmul_(step, (power / before.clamp_min(1e-30))[:, None])
    return found
