"""Turn MODEL into a torch module: a Hugging Face folder, a hub id, an alias, or a factory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zipc.core.errors import UnsupportedModel, UsageError
from zipc.core.types import InputSpec
from zipc.pruner.graph.as_traced import AsTraced
from zipc.pruner.graph.sites import Structure, find_sites
from zipc.pruner.graph.trace import Program, trace
from zipc.sources.attention import ATTENTION, register_attention
from zipc.sources.common import (
    BATCH,
    SourceModel,
    Written,
    make_example,
    open_axes,
    register_output,
)
from zipc.sources.decode import with_cache
from zipc.sources.factory import TRACED, load_factory
from zipc.sources.hub import ALIASES, Alias
from zipc.sources.huggingface import build_module, load_config, load_folder
from zipc.sources.sizes import settle
from zipc.user_code import split_reference

SHORT = 4  # tokens; shorter sequences may be traced differently

__all__ = [
    "ALIASES",
    "ATTENTION",
    "Alias",
    "SourceModel",
    "build_module",
    "load_config",
    "load_source",
    "register_attention",
    "run_as_traced_",
    "settle",
    "trace_source",
    "traced_module",
    "with_cache",
]


def load_source(
    model: str,
    *,
    weights: str | Path | None = None,
    input_shapes: Sequence[InputSpec] = (),
    rows: Sequence[InputSpec] = (),
) -> SourceModel:
    """Load MODEL in fp32 evaluation mode.

    `weights` belong to a factory, `input_shapes` to a factory or a model of images; where neither
    they nor the file of the factory say how large an input is, `rows` do: those of the data.

    Raises:
        UsageError: it cannot be found or read, or its inputs are not known.
        UnsupportedModel: its architecture is unknown, needs custom code, or is quantised.
    """
    if split_reference(model) is not None:
        return load_factory(model, weights=weights, input_shapes=input_shapes, rows=rows)
    if weights is not None:
        raise UsageError(
            f"--weights belongs to a model given as path/to/file.py:factory; {model} has its own."
        )
    return load_folder(model, input_shapes=input_shapes)


def traced_module(module: nn.Module, specs: Sequence[Mapping[str, Any]]) -> nn.Module:
    """A module of a factory that runs its graph, traced on inputs such as the recipe has.

    Raises:
        UnsupportedModel: torch.export cannot follow it any more.
    """
    inputs = [InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in specs]
    example = make_example(inputs, {BATCH: 2})
    module.float()
    with torch.no_grad():
        register_output(module(**example))
    program = trace(module, example, dynamic=open_axes(inputs))
    return AsTraced(module, program, find_sites(program))


def run_as_traced_(
    source: SourceModel, program: Program, structure: Structure, follows: Structure
) -> None:
    """Let the module of a source be its graph from now on, and say so to `zipc.load`.

    `follows` has the sites at which its code does follow.
    """
    specs = [asdict(spec) for spec in source.specs]
    blank = source.blank
    stays = {s.name for s in structure.sites} - {s.name for s in follows.sites}
    source.written = Written(
        source.module, blank, dict(source.recipe), follows.attributes, frozenset(stays)
    )
    source.module = AsTraced(source.module, program, structure)
    source.blank = lambda: traced_module(blank(), specs)
    source.recipe[TRACED] = specs


def trace_source(source: SourceModel, *, batch: int = 1) -> Program:
    """Trace the module with its open axes; its outputs are those of the source.

    Code that treats the shortest or the longest sequences in a way of its own is traced for those
    between; where it cannot be traced for every batch, the axis is closed at `batch`. A note says
    so.

    Raises:
        UnsupportedModel: torch.export cannot follow the module; names the reason.
    """
    try:
        program = _trace(source)
    except UnsupportedModel as error:
        program = _trace_usual_lengths(source) or _trace_one_batch(source, batch, error)
    if program.refused:
        source.notes.append(
            f"torch.export does not follow the code ({program.refused}): traced by torch.fx"
        )
    given = program.outputs
    program.outputs = [given[i] for i, _ in source.outputs]
    if source.cache is not None:
        program.caches = frozenset(source.cache.public)
        program.kept = [given[i] for i, _ in source.cache.outputs]
    return program


def _trace(source: SourceModel, *, least: int | None = None) -> Program:
    return trace(
        source.module,
        source.example(),
        dynamic=source.dynamic,
        limits=source.limits,
        least={} if least is None else dict.fromkeys(source.limits, least),
    )


def _trace_usual_lengths(source: SourceModel) -> Program | None:
    """Trace for sequences that are neither very short nor the longest; None where that fails."""
    if not source.limits or source.max_length <= 2 * SHORT:
        return None
    source.max_length -= 1
    try:
        program = _trace(source, least=SHORT)
    except UnsupportedModel:
        source.max_length += 1
        return None
    source.notes.append(
        f"the model treats the shortest and the longest sequences in a way of its own: the graph "
        f"is for {SHORT} to {source.max_length} tokens"
    )
    return program


def _trace_one_batch(source: SourceModel, batch: int, error: UnsupportedModel) -> Program:
    specs, cache = source.specs, source.cache
    source.fix_batch_(batch)
    try:
        if source.specs == specs:
            raise error
        program = _trace(source)
    except UnsupportedModel:
        source.specs, source.cache = specs, cache
        raise error from None
    source.notes.append(
        f"the model cannot be traced for every batch: the graph takes batches of {batch} only"
    )
    return program
