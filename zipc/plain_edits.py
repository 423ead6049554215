"""Edits with the right shapes and unrepaired weights: what is timed before weights are repaired."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from zipc.core.types import Level
from zipc.exporters.specialise import Edit, Int8Weights
from zipc.numerics.bf16 import BF16
from zipc.numerics.int8 import STATIC, quantize_weight
from zipc.prepare import Prepared
from zipc.pruner.graph.cuts import Cuts
from zipc.pruner.graph.mixtures import rerouted
from zipc.pruner.graph.sites import sizes_at
from zipc.pruner.maps import matrices
from zipc.pruner.sparse import halved, refusal


def plain_edit(
    prepared: Prepared, levels: Mapping[str, Level], kept: Mapping[str, tuple[int, ...]]
) -> Edit:
    """An edit with the right shapes and unrepaired weights: latency does not depend on values."""
    weights, calls = prepared.weights, prepared.calls
    cut = [prepared.sites[n] for n, lv in levels.items() if not lv.removed]
    cuts = Cuts(cut)
    tensors = {p: cuts.cut(weights[p], p, kept).numpy() for p in cuts.pieces}
    removed: dict[str, np.ndarray[Any, Any]] = {}
    integers: dict[str, Int8Weights] = {}
    narrow: list[str] = []
    for name, level in levels.items():
        site = prepared.sites[name]
        if level.removed:
            for consumer in site.consumers:
                call = calls[consumer.module]
                shape = cuts.shape(call.weight, weights[call.weight].shape, widths_in(levels))
                removed[consumer.module] = np.zeros(shape[call.out_dim], dtype=np.float32)
            continue
        integer = level.within(prepared.numeric).numeric.startswith("int8")
        for module in site.maps if level.pattern != "dense" else ():
            call, name = calls[module], calls[module].weight
            if refusal(call, tensors[name].shape, integer=integer) is None:
                tensors[name] = halved(call, torch.from_numpy(tensors[name])).numpy()
    for module, level in _numerics_of_maps(prepared, levels).items():
        if level.removed or level.numeric == "fp32" or not calls[module].rounds:
            continue
        if level.numeric == BF16:
            narrow.append(module)
            continue
        call = calls[module]
        weight = torch.from_numpy(tensors[call.weight])
        rounded = quantize_weight(matrices(call, weight)[0], numeric=level.numeric)
        values = rounded.values.view_as(weight) if call.convolution else rounded.values
        integers[module] = Int8Weights(
            values.numpy(),
            rounded.scale.numpy(),
            (0.05, 128) if level.numeric == STATIC else None,
        )
    routes = rerouted(cut, kept)
    for module in routes.ends:
        shape = cuts.shape(
            calls[module].weight, weights[calls[module].weight].shape, widths_in(levels)
        )
        removed[module] = np.zeros(shape[calls[module].out_dim], dtype=np.float32)
    size_of = sizes_at(prepared.structure, widths_in(levels))
    return Edit(tensors, removed, integers, size_of, routes.picks, routes.ends, narrow)


def _numerics_of_maps(prepared: Prepared, levels: Mapping[str, Level]) -> dict[str, Level]:
    """The level whose numeric a map has: of the site it produces, else of the one it consumes."""
    found: dict[str, Level] = {}
    for name, level in levels.items():
        site = prepared.sites[name]
        found |= {m: level for m in site.maps if m in site.producers or m not in found}
    return found


def first_units(levels: Mapping[str, Level]) -> dict[str, tuple[int, ...]]:
    """As many units as the levels say; which, does not matter to the latency."""
    return {n: tuple(range(lv.width)) for n, lv in levels.items()}


def widths_in(levels: Mapping[str, Level]) -> dict[str, int]:
    return {n: lv.width for n, lv in levels.items()}
