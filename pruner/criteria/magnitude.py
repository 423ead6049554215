"""Scores read off once: the norm of a unit's weights, with or without its activations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zipc.pruner.obs import Sweep, error_curve


def magnitude(
    weight: Tensor, gram: Tensor, *, unit_columns: Tensor, rng: np.random.Generator
) -> Sweep:
    """Order by the squared norm of the unit's columns."""
    return _ranked(_column_norms(weight), weight, gram, unit_columns)


def act_norm(
    weight: Tensor, gram: Tensor, *, unit_columns: Tensor, rng: np.random.Generator
) -> Sweep:
    """Order by the squared norm of the columns times that of their inputs (Sun et al. 2024)."""
    return _ranked(_column_norms(weight) * gram.double().diagonal(), weight, gram, unit_columns)


def _column_norms(weight: Tensor) -> Tensor:
    return weight.double().square().sum(dim=0)  # (in,)


def _ranked(scores: Tensor, weight: Tensor, gram: Tensor, unit_columns: Tensor) -> Sweep:
    by_unit = scores[unit_columns].sum(dim=1)
    order = tuple(torch.argsort(by_unit, stable=True).tolist())
    return Sweep(order, error_curve(weight, gram, order, unit_columns))
