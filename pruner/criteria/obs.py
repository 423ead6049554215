"""Greedy structured OBS: the unit whose loss the others repair best goes next."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from zipc.pruner.obs import Sweep, sweep


def obs(weight: Tensor, gram: Tensor, *, unit_columns: Tensor, rng: np.random.Generator) -> Sweep:
    """Order by exact one-at-a-time elimination; draws nothing from `rng`."""
    return sweep(weight, gram, unit_columns=unit_columns)
