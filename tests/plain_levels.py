"""Levels of a prepared model without a search for the order of its units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from zipc.prepare import Prepared
from zipc.pruner.evidence import collect
from zipc.pruner.levels import Levels
from zipc.pruner.obs import Sweep


def plain_levels(made: Prepared, batches: Sequence[Mapping[str, Tensor]]) -> Levels:
    """The levels of all sites, whose units go in the order of their numbers."""
    sites = made.structure.sites
    stats = collect(made.executor, batches, modules=[m for site in sites for m in site.maps])
    sweeps = {
        s.name: Sweep(tuple(range(s.units)), tuple(float(i) for i in range(s.units + 1)))
        for s in sites
    }
    return Levels(made.sites, made.calls, made.weights, stats, sweeps)
