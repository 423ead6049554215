"""A finished network brought to INT8 as a whole: which ranges and which sums lose least."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from zipc.build import Built, in_integers
from zipc.candidates import Candidates
from zipc.core.errors import ExportMismatch
from zipc.core.types import Progress, Workload
from zipc.integer_body import RANGES, IntegerBody
from zipc.prepare import Prepared
from zipc.profiler.runners.session import SessionRunner


def network_in_integers(
    prepared: Prepared,
    body: IntegerBody,
    candidates: Candidates,
    floats: Built,
    *,
    workload: Workload,
    fast_enough: Callable[[bytes], bool],
    progress: Progress,
) -> Built:
    """The network in INT8; with exact sums, which lose less and are slower, where they do lose less
    on the confirming rows, are fast enough, and nothing had to be removed for speed.

    Raises:
        ExportMismatch: no way of choosing ranges is possible with rounded sums.
    """

    def made(way: IntegerBody) -> tuple[float, Built]:
        return _best_ranges(prepared, way, candidates, floats, workload=workload, progress=progress)

    loss, built = made(body)
    if not floats.allocation.undiminished(prepared.sites):
        return built
    try:
        exact_loss, exact = made(replace(body, exact_sums=True))
    except ExportMismatch:  # told in the notes; no product may be left that runs on integers
        return built
    if exact_loss >= loss:
        return built
    enough = fast_enough(exact.model)
    candidates.notes.append(f"INT8 with exact sums: {'taken' if enough else 'too slow'}")
    return exact if enough else built


def _best_ranges(
    prepared: Prepared,
    body: IntegerBody,
    candidates: Candidates,
    floats: Built,
    *,
    workload: Workload,
    progress: Progress,
) -> tuple[float, Built]:
    """The network in INT8 under the ranges that cost least on the confirming rows, and its oracle.

    Raises:
        ExportMismatch: no way of choosing ranges is possible.
    """
    progress.stage("INT8 ranges", len(RANGES))
    sums = ", exact sums" if body.exact_sums else ""
    found: list[tuple[float, str, Built]] = []
    refused: dict[str, ExportMismatch] = {}
    for ranges in RANGES:
        way = replace(body, ranges=ranges)
        try:
            built = in_integers(prepared, floats, way, workload=workload)
        except ExportMismatch as error:  # a constant activation has no histogram
            refused[ranges] = error
            candidates.notes.append(f"INT8 ranges by {ranges}{sums} are not possible: {error}")
            continue
        runner = prepared.runtime.runner(built.model, workload=workload)

        def outputs(feeds: Mapping[str, Tensor], runner: SessionRunner = runner) -> list[Tensor]:
            values = runner.outputs(prepared.for_graph(feeds))
            return [torch.from_numpy(values[name]) for _, name in prepared.source.outputs]

        found.append((candidates.confirm.judge(outputs), ranges, built))
        progress.advance(1, ranges)
    if not found:
        raise refused[RANGES[0]]
    loss, ranges, built = min(found, key=lambda entry: entry[0])
    told = ", ".join(f"{name} {value:.5f}" for value, name, _ in found)
    candidates.notes.append(f"INT8 ranges by {ranges}{sums}; oracle: {told}")
    progress.done(f"{ranges}{sums}, oracle {loss:.5f}")
    return loss, built
