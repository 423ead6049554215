"""Criteria: in which order the units of a site go. All read the same two matrices."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np
from torch import Tensor

from zipc.pruner.criteria.magnitude import act_norm, magnitude
from zipc.pruner.criteria.obs import obs
from zipc.pruner.criteria.random import random
from zipc.pruner.obs import Sweep


class Criterion(Protocol):
    """Ranks units; the errors it returns are those after the least-squares refit.

    `weight` (out, in) is the consumer's, `gram` (in, in) the second moments of its input, and
    `unit_columns` (units, columns per unit) says which columns each unit owns.
    """

    def __call__(
        self, weight: Tensor, gram: Tensor, *, unit_columns: Tensor, rng: np.random.Generator
    ) -> Sweep: ...


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {"obs": obs, "magnitude": magnitude, "act_norm": act_norm, "random": random}
)
