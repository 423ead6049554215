"""Ladders: for each site the order in which its units go and the error of every width."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from zipc.core.types import Site
from zipc.pruner.compensate.least_squares import REFIT_DAMP, center, damped_cholesky
from zipc.pruner.criteria import CRITERIA
from zipc.pruner.evidence import InputStats
from zipc.pruner.graph.trace import MapCall
from zipc.pruner.maps import matrices
from zipc.pruner.obs import Sweep


def sweep_site(
    site: Site,
    weights: Mapping[str, Tensor],
    stats: Mapping[str, InputStats],
    calls: Mapping[str, MapCall],
    *,
    criterion: str = "obs",
    seed: int = 0,
) -> Sweep:
    """Order the units of a site; errors are relative to the dense output of its consumers.

    Consumers that share the units, and the groups of a grouped one, are treated as one map: their
    Gram matrices side by side on a diagonal, each weight scaled so that every consumer's dense
    output counts the same. Columns of a consumer that other sites own are kept by all levels.
    """
    parts, grams, owned, offset = [], [], [], 0
    for consumer in site.consumers:
        call = calls[consumer.module]
        held = stats[consumer.module]
        mine = torch.tensor([consumer.columns([u]) for u in range(site.units)])
        rest = torch.ones(held.gram.shape[-1], dtype=torch.bool)
        rest[mine.flatten()] = False
        place = torch.full((len(rest),), -1)
        place[mine.flatten()] = torch.arange(mine.numel())
        for W, gram, total in zip(
            matrices(call, weights[call.weight]), held.gram, held.total, strict=True
        ):  # (out, in)
            H, _ = center(gram, total, held.count)  # (in, in)
            energy = float(torch.einsum("oi,ij,oj->", W.double(), H, W.double()))
            H = _given(H, mine.flatten(), rest)
            W = W[:, mine.flatten()]
            parts.append(W / max(energy, 1e-30) ** 0.5 if len(site.consumers) > 1 else W)
            grams.append(H)
            owned.append(place[mine] + offset)
            offset += W.shape[1]
    return CRITERIA[criterion](
        torch.block_diag(*parts),  # type: ignore[no-untyped-call]
        torch.block_diag(*grams),  # type: ignore[no-untyped-call]
        unit_columns=torch.cat(owned, dim=1),
        rng=np.random.default_rng(seed),
    )


def _given(gram: Tensor, mine: Tensor, rest: Tensor) -> Tensor:
    """What of the inputs `mine` the other inputs cannot explain: the Schur complement."""
    own = gram[mine][:, mine]
    if not bool(rest.any()):
        return own
    lower, _ = damped_cholesky(gram[rest][:, rest], REFIT_DAMP, scale=float(gram.diagonal().mean()))
    half = torch.linalg.solve_triangular(lower, gram[rest][:, mine], upper=False)
    left: Tensor = own - half.T @ half
    return left


def widths_of(site: Site, *, step: int) -> list[int]:
    """Widths offered to the search, ascending: removed where it can be, the grid, dense.

    Every head count; other units on a grid of `step`, finer for narrow sites.
    """
    if site.kind == "heads" or site.units <= 32:
        return list(range(site.least, site.units + 1))
    while step > 8 and site.units // step < 16:
        step //= 2
    return [w for w in range(0, site.units, step) if w >= site.least] + [site.units]
