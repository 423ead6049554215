"""Repair the columns that are kept: closed-form least squares on the Gram matrix of the inputs.

`W_K = W H[:, K] (H_KK)^-1` is the minimiser of `||W X - W_K X_K||^2` and equals what the running
OBS updates arrive at (Hassibi & Stork 1993; ZipLM, Kurtic et al. 2023). H is damped on its
diagonal, so the weights are drawn towards the original ones and keeping everything changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zipc.core.errors import UsageError

REFIT_DAMP = 1e-4
LARGEST_DAMP = 1e-1
ROUNDING = 1e-10  # of a second moment: of activations that are constant but for fp32
INT8_NOISE = 8e-5  # variance that rounding adds, of a second moment: a range of 4 of its roots


def center(
    gram: Tensor, total: Tensor, count: float, *, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Subtract the mean from second moments; returns the centred Gram matrix and the mean.

    `gram` is `sum x x^T` (in, in), `total` is `sum x` (in,), `count` the number of tokens. A column
    that is constant up to rounding becomes exactly zero: the bias takes over all it did. `noise` is
    the variance of what is added to every other column before it is read, as a share of the mean
    second moment: what drowns in it is not worth a large weight.
    """
    if count <= 0:
        raise UsageError("No calibration tokens were seen. Check that --data is not empty.")
    gram, total = gram.double(), total.double()
    mean = total / count
    centred = gram - torch.outer(total, mean)
    constant = centred.diagonal() <= ROUNDING * gram.diagonal()
    centred.diagonal().add_(noise * gram.diagonal().mean())
    centred[constant, :] = 0.0
    centred[:, constant] = 0.0
    return centred, mean


def refit(
    weight: Tensor,
    bias: Tensor | None,
    centred_gram: Tensor,
    mean: Tensor,
    *,
    keep: Tensor,
    damp: float = REFIT_DAMP,
) -> tuple[Tensor, Tensor]:
    """Return the weight (out, kept) and bias (out,) that best reproduce the dense output.

    `keep` holds column indices in the order wanted; with none, the bias alone gives the mean
    output. Computed in fp64, returned in the dtype of `weight`.
    """
    columns, rest = split(keep, weight.shape[1])
    dense = weight.double()  # (out, in)
    gram = centred_gram.double()
    refitted = dense[:, columns]
    if len(columns) and len(rest):
        lower, _ = damped_cholesky(
            gram[columns][:, columns], damp, scale=float(gram.diagonal().mean())
        )
        lost = dense[:, rest] @ gram[rest][:, columns]  # (out, kept)
        refitted = refitted + torch.cholesky_solve(lost.T, lower).T
    return refitted.to(weight.dtype), shifted_bias(dense, bias, mean, columns, refitted).to(
        weight.dtype
    )


def shifted_bias(
    dense: Tensor, bias: Tensor | None, mean: Tensor, columns: Tensor, kept: Tensor
) -> Tensor:
    """Bias (out,) in fp64 under which the mean output stays what it was."""
    mean = mean.double()
    shift = dense.double() @ mean - kept.double() @ mean[columns]
    return shift if bias is None else bias.double() + shift


def split(keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the kept column indices and the others, ascending."""
    if keep.dtype == torch.bool:
        raise TypeError("keep holds column indices, not a mask")
    gone = torch.ones(width, dtype=torch.bool, device=keep.device)
    gone[keep] = False
    if int(gone.sum()) != width - keep.numel():
        raise ValueError("keep names a column twice")
    return keep.long(), gone.nonzero().flatten()


def damped_cholesky(gram: Tensor, damp: float, *, scale: float) -> tuple[Tensor, float]:
    """Factor `gram + shift * I`, never failing; returns the lower factor and the shift.

    The shift is `damp * scale`, ten times more after each failure up to 0.1 * scale, and then as
    much as lifts the smallest eigenvalue to `damp * scale`. `scale` is the mean of the diagonal.

    Raises:
        UsageError: the matrix holds NaN or infinity.
    """
    if not bool(torch.isfinite(gram.sum())):  # NaN and infinity survive a sum
        raise UsageError(
            "The calibration activations contain NaN or infinity. Check the model and --data: "
            "run the model in fp32 on one sample and look at its outputs."
        )
    scale = scale if scale > 0 else 1.0
    share = damp
    while share <= max(damp, LARGEST_DAMP) * (1 + 1e-9):
        lower, failed = torch.linalg.cholesky_ex(_shifted(gram, share * scale))
        if not int(failed):
            return lower, share * scale
        share = share * 10 if share > 0 else 1e-8
    smallest = float(torch.linalg.eigvalsh(gram)[0])
    shift = max(damp, 1e-8) * scale + max(0.0, -smallest)
    lower, failed = torch.linalg.cholesky_ex(_shifted(gram, shift))
    if int(failed):
        raise UsageError(
            "The calibration statistics cannot be factored. They are not a sum of x x^T: "
            "delete the cached evidence and run again."
        )
    return lower, shift


def _shifted(gram: Tensor, shift: float) -> Tensor:
    shifted = gram.clone()
    shifted.diagonal().add_(shift)
    return shifted
