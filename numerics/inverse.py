"""The factor of the inverse Gram matrix along which GPTQ and SparseGPT feed errors forward."""

from __future__ import annotations

import torch
from torch import Tensor

from zipc.core.errors import UsageError


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper triangular fp32 U (in, in) with U'U = (H + shift I)^-1, factored in fp64.

    The shift is `damp` of the mean diagonal, ten times more after each failure.

    Raises:
        UsageError: the matrix holds NaN or infinity.
    """
    H = gram.to(torch.float64).clone()
    if not bool(torch.isfinite(H).all()):
        raise UsageError("The calibration activations contain NaN or infinity. Check --data.")
    mean = H.diagonal().mean().clamp_min(1e-12)
    while True:
        damped = H + torch.eye(len(H), dtype=H.dtype) * (damp * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(factor)
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0:
                factored: Tensor = upper.to(torch.float32)
                return factored
        damp *= 10
