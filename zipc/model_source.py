"""Turn MODEL into a torch module: a Hugging Face folder, a hub id, an alias, or a factory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zipc.core.errors import UnsupportedModel, UsageError
from zipc.core.types import InputSpec
from zipc.pruner.graph.as_traced import AsTraced
from zipc.pruner.graph.sites import Structure, find_sites
from zipc.pruner.graph.trace import Program, trace
from zipc.sources.attention import ATTENTION, register_attention
from zipc.sources.common import (
    LENGTH,
    SourceModel,
    Written,
    example_sizes,
    limited,
    make_example,
    open_axes,
    register_output,
)
from zipc.sources.decode import with_cache
from zipc.sources.factory import load_factory
from zipc.sources.hub import ALIASES, Alias
from zipc.sources.huggingface import build_module, load_config, load_folder
from zipc.sources.sizes import settle
from zipc.user_code import split_reference

SHORT = 4  # tokens; shorter sequences may be traced differently
# In the recipe of a checkpoint: what a module that runs its graph was traced on, and for which
# lengths of its sequences.
TRACED, LENGTHS = "traced_on", "traced_lengths"

__all__ = [
    "ALIASES",
    "ATTENTION",
    "Alias",
    "SourceModel",
    "as_recipe_says",
    "build_module",
    "load_config",
    "load_source",
    "register_attention",
    "run_as_traced_",
    "settle",
    "trace_source",
    "with_cache",
]


def load_source(
    model: str,
    *,
    weights: str | Path | None = None,
    input_shapes: Sequence[InputSpec] = (),
    rows: Callable[[], Sequence[InputSpec]] = tuple,
) -> SourceModel:
    """Load MODEL in fp32 evaluation mode.

    `weights` belong to a factory, `input_shapes` to all but models of texts; where neither they nor
    the file of a factory say how large an input is, `rows` reads it off the data.

    Raises:
        UsageError: it cannot be found or read, or its inputs are not known.
        UnsupportedModel: its architecture is unknown, needs custom code, or is quantised.
    """
    if split_reference(model) is not None:
        return load_factory(model, weights=weights, input_shapes=input_shapes, rows=rows())
    if weights is not None:
        raise UsageError(
            f"--weights belongs to a model given as path/to/file.py:factory; {model} has its own."
        )
    return load_folder(model, input_shapes=input_shapes, rows=rows)


def as_recipe_says(module: nn.Module, recipe: Mapping[str, Any]) -> nn.Module:
    """The module, or where the recipe says so one that runs its graph, traced as it was then.

    Raises:
        UnsupportedModel: torch.export cannot follow it any more.
    """
    if TRACED not in recipe:
        return module
    inputs = [InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in recipe[TRACED]]
    least, most = recipe.get(LENGTHS, (None, LENGTH))
    example = make_example(inputs, example_sizes(batch=2, length=min(LENGTH, most)))
    module.float().eval()
    with torch.no_grad():
        register_output(module(**example))
    program = _traced(module, example, inputs, least=least, most=most)
    return AsTraced(module, program, find_sites(program))


def run_as_traced_(
    source: SourceModel, program: Program, structure: Structure, follows: Structure
) -> None:
    """Let the module of a source be its graph from now on, and say so to `zipc.load`.

    `follows` has the sites at which its code does follow.
    """
    cache, blank = source.cache, source.blank
    specs = source.specs if cache is None else cache.without
    stays = {s.name for s in structure.sites} - {s.name for s in follows.sites}
    source.written = Written(
        source.module, blank, dict(source.recipe), follows.attributes, frozenset(stays)
    )
    source.module = AsTraced(source.module, program, structure)
    recipe = source.recipe | {TRACED: [asdict(spec) for spec in specs]}
    if limited(specs, source.max_length):
        recipe[LENGTHS] = [source.min_length, source.max_length]
    source.recipe = recipe
    if cache is None:
        source.blank = lambda: as_recipe_says(blank(), recipe)
    else:  # a checkpoint has no cache
        source.blank = lambda: AsTraced(blank(), program, structure)


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


def _trace(source: SourceModel) -> Program:
    least, most = source.min_length, source.max_length
    return _traced(source.module, source.example(), source.all_specs, least=least, most=most)


def _traced(
    module: nn.Module,
    example: Mapping[str, Tensor],
    specs: Sequence[InputSpec],
    *,
    least: int | None,
    most: int,
) -> Program:
    """Trace a module for the axes that its inputs leave open, and sequences of these lengths."""
    limits = limited(specs, most)
    shortest = {} if least is None else dict.fromkeys(limits, least)
    return trace(module, example, dynamic=open_axes(specs), limits=limits, least=shortest)


def _trace_usual_lengths(source: SourceModel) -> Program | None:
    """Trace for sequences that are neither very short nor the longest; None where that fails."""
    if not source.limits or source.max_length <= 2 * SHORT:
        return None
    source.max_length, source.min_length = source.max_length - 1, SHORT
    try:
        program = _trace(source)
    except UnsupportedModel:
        source.max_length, source.min_length = source.max_length + 1, None
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
