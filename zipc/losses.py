"""Label-free losses of a candidate's outputs against the dense model's, one figure a row."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from zipc.core.errors import UsageError

Loss = Callable[[Tensor, Tensor], Tensor]  # dense (n, d), candidate (n, d) -> (n,)
LARGEST = 1e15  # of an output: the squares of larger ones add up to no number in fp32
CHUNK = 1 << 20  # elements worked on at once, so that large vocabularies cost little memory


def mean_loss(loss: Loss, dense: Tensor, candidate: Tensor) -> float:
    """Return the mean of `loss` over the rows; infinity for a candidate that is not finite.

    Raises:
        UsageError: the dense outputs are not finite, or too large.
    """
    require_finite(dense)
    if not torch.isfinite(candidate).all():
        return math.inf
    step = max(1, CHUNK // max(1, dense.shape[-1]))
    rows = zip(torch.split(dense, step), torch.split(candidate, step), strict=True)
    return sum(float(loss(d, c).sum(dtype=torch.float64)) for d, c in rows) / len(dense)


def require_finite(dense: Tensor) -> None:
    """Refuse dense outputs that nothing can be compared with.

    Raises:
        UsageError: one of them is NaN, infinite, or too large to be squared.
    """
    low, high = (float(end) for end in torch.aminmax(dense))
    if math.isfinite(low) and math.isfinite(high):
        if max(-low, high) <= LARGEST:
            return
        found = f"numbers as large as {max(-low, high):.0e}"
    else:
        found = "NaN or infinity"
    raise UsageError(
        f"The dense model gives {found} on the search data: nothing can be compared with that. "
        "Check the scale of the data."
    )


def divergence(dense: Tensor, candidate: Tensor) -> Tensor:
    """KL(dense || candidate) of two sets of logits or log-probabilities."""
    log_p, log_q = dense.log_softmax(-1), candidate.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def cosine_loss(dense: Tensor, candidate: Tensor) -> Tensor:
    """One minus the cosine."""
    return 1 - torch.nn.functional.cosine_similarity(dense, candidate, dim=-1)


def unexplained(dense: Tensor, candidate: Tensor) -> Tensor:
    """Squared error over the variance of the dense outputs: one column, all rows at once."""
    return (dense - candidate).square().sum(-1) / dense.var(correction=0).clamp_min(1e-12)


def relative_error(dense: Tensor, candidate: Tensor) -> Tensor:
    """Squared error over the square of the dense row."""
    scale = dense.square().sum(-1).clamp_min(1e-12)
    return (dense - candidate).square().sum(-1) / scale
