"""The final weights of a chosen allocation: repaired where that brings outputs nearer to dense."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zipc.build import Built, build_floats
from zipc.candidates import Candidates
from zipc.core.memory import release, trim
from zipc.core.request import Request
from zipc.core.types import Allocation, Progress
from zipc.prepare import Prepared
from zipc.pruner.compensate.propagate import RIDGE, propagate
from zipc.pruner.on_grid import on_grid
from zipc.pruner.states import States, variant_of
from zipc.quantizer import by_modelopt, in_floats

RIDGES = (RIDGE, 10 * RIDGE)  # the next where few calibration rows make the one before it hurt


def repaired(
    prepared: Prepared,
    candidates: Candidates,
    allocation: Allocation,
    request: Request,
    progress: Progress,
) -> Built:
    """Give the chosen allocation its final weights; its latency is that of the look."""
    candidates.scorer.forget()
    candidates.levels.forget()
    release()
    theirs = request.quantizer == "modelopt"
    states = _best(prepared, candidates, in_floats(allocation) if theirs else allocation, progress)
    if theirs:
        states = by_modelopt(prepared, allocation, states, candidates.repair)
    if prepared.body is not None:
        limit = prepared.body.weight_limit
        states = on_grid(candidates.levels, allocation, states, limit=limit)
    return build_floats(prepared, allocation, states, workload=request.workload)


def _best(
    prepared: Prepared, candidates: Candidates, allocation: Allocation, progress: Progress
) -> States:
    """Those weights that lose least on the confirming rows: repaired ones, or the ladder's."""

    def loss(states: States) -> float:
        variant = variant_of(allocation, states)

        @torch.no_grad()
        def outputs(feeds: Mapping[str, Tensor]) -> list[Tensor]:
            return list(prepared.executor.run(feeds, variant)[0])

        return candidates.confirm.judge(outputs)

    def advance(site: str) -> None:
        progress.advance(1, site)
        trim()

    ladder = candidates.levels.states(allocation, feedback=True)
    if allocation.undiminished(prepared.sites):
        return ladder
    before = loss(ladder)
    for ridge in RIDGES:
        progress.stage("repair", len(allocation.levels))
        states = propagate(
            prepared.executor,
            candidates.levels,
            allocation,
            candidates.repair,
            ridge=ridge,
            on_site=advance,
        )
        found = loss(states)
        progress.done(f"oracle {before:.5f} to {found:.5f}")
        if found < before:
            return states
    candidates.notes.append("repair brought outputs no nearer to dense: left out")
    return ladder
