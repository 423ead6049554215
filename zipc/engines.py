"""Engines that a board has built, read back: what they compute in, and what they pass over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx

from zipc.build import Built
from zipc.core.types import PairedTiming, Runner, Site
from zipc.exporters.tensorrt.readback import ReadBack, read_back
from zipc.patterns import SPARSE
from zipc.profiler.remote import EngineRunner
from zipc.shipped import Shipped

ENGINE = "engine of model.onnx: "  # before what is told of it


def engine_of(runner: Runner, shipped: Shipped) -> ReadBack | None:
    """What the engine of a graph holds; None where it is run without one.

    Raises:
        EngineFailed: it does not tell, or computes a product in more bits than its graph.
    """
    if not isinstance(runner, EngineRunner):
        return None
    model = onnx.load_from_string(shipped.model)
    return read_back(runner.layers(), [], model, shipped.places)


def noted(timing: PairedTiming, runner: Runner, shipped: Shipped) -> PairedTiming:
    """The timing of a graph with what is told of its engine, where it has one."""
    engine = engine_of(runner, shipped)
    return timing if engine is None else replace(timing, notes=(*timing.notes, f"{ENGINE}{engine}"))


def passed_over(
    engine: ReadBack, built: Built, shipped: Shipped, sites: Sequence[Site]
) -> list[str]:
    """Sites with 2:4 weights, none of which the engine multiplies by a sparse kernel.

    TensorRT takes a sparse kernel where it timed it to be faster, which varies between builds.
    """
    paths = {shipped.places.get(node, "").rpartition(" of ")[2] for node in engine.sparse}
    found = []
    for site in sites:
        states = [(m, built.states.maps[m]) for m in site.maps if m in built.states.maps]
        sparse = [m for m, state in states if state.pattern == SPARSE]
        level = built.allocation.levels.get(site.name)
        asked = level is not None and level.pattern == SPARSE
        if asked and sparse and paths.isdisjoint(sparse):
            found.append(site.name)
    return found
