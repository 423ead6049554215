"""No criterion at all: the baseline every other one has to beat."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from zipc.pruner.obs import Sweep, error_curve


def random(
    weight: Tensor, gram: Tensor, *, unit_columns: Tensor, rng: np.random.Generator
) -> Sweep:
    """Order by a permutation drawn from `rng`."""
    order = tuple(rng.permutation(len(unit_columns)).tolist())
    return Sweep(order, error_curve(weight, gram, order, unit_columns))
