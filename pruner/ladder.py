"""Ladders: for each site the order in which its units go and the error of every width."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from zipc.core.types import Site
from zipc.pruner.compensate.least_squares import center
from zipc.pruner.criteria import CRITERIA
from zipc.pruner.evidence import InputStats
from zipc.pruner.graph.surgery import columns
from zipc.pruner.obs import Sweep


def sweep_site(
    site: Site,
    weights: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    *,
    criterion: str = "obs",
    seed: int = 0,
) -> Sweep:
    """Order the units of a site; errors are relative to the dense output of its consumers.

    Consumers that share the units are treated as one map: their Gram matrices side by side on a
    diagonal, each weight scaled so that every consumer's dense output counts the same.
    """
    parts, grams, owned, offset = [], [], [], 0
    for consumer in site.consumers:
        W = weights[consumer.module + ".weight"]  # (out, in)
        held = stats[consumer.module]
        H, _ = center(held.gram, held.total, held.count)  # (in, in)
        energy = float(torch.einsum("oi,ij,oj->", W.double(), H, W.double()))
        parts.append(W / max(energy, 1e-30) ** 0.5 if len(site.consumers) > 1 else W)
        grams.append(H)
        units = [
            columns(consumer.outer, site.units, consumer.inner, [u]) for u in range(site.units)
        ]
        owned.append(torch.stack(units) + offset)
        offset += W.shape[1]
    return CRITERIA[criterion](
        torch.block_diag(*parts),  # type: ignore[no-untyped-call]
        torch.block_diag(*grams),  # type: ignore[no-untyped-call]
        unit_columns=torch.cat(owned, dim=1),
        rng=np.random.default_rng(seed),
    )


def widths_of(site: Site, *, step: int) -> list[int]:
    """Widths offered to the search, ascending: removed, the grid, dense.

    Every head count; other units on a grid of `step`, finer for narrow sites.
    """
    if site.kind == "heads" or site.units <= 32:
        return list(range(site.units + 1))
    while step > 8 and site.units // step < 16:
        step //= 2
    return sorted({*range(0, site.units, step), site.units})
