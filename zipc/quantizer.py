"""INT8 by NVIDIA's Model Optimizer in place of ours: its ranges and its rounding, in our graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zipc.build import rebuild, shrunk
from zipc.core.errors import UnsupportedModel, UsageError
from zipc.core.quiet import hush
from zipc.core.types import Allocation, Site
from zipc.numerics.int8 import FULL, STATIC, ActivationRange, QuantizedWeight
from zipc.prepare import Prepared
from zipc.pruner.states import MapState, States
from zipc.samples import Feeds


def check_modelopt(weight_limit: int) -> None:
    """Refuse it where it is not installed, or where its weights would overflow.

    Raises:
        UsageError: either of them.
    """
    _modelopt()
    if weight_limit < FULL:
        raise UsageError(
            "--quantizer modelopt rounds weights to 8 bits, whose products with inputs of 8 bits "
            "overflow on this processor (no VNNI). Leave it out."
        )


def takes(site: Site) -> bool:
    """Whether it may round a site: of maps that nothing is cut from it leaves some in floats."""
    return site.kind != "map"


def in_floats(allocation: Allocation) -> Allocation:
    """The same widths and patterns before anything is rounded."""
    levels = {n: replace(lv, numeric="fp32") for n, lv in allocation.levels.items()}
    return replace(allocation, levels=levels)


def by_modelopt(
    prepared: Prepared, allocation: Allocation, floats: States, batches: Sequence[Feeds]
) -> States:
    """Round the maps of an allocation that are in INT8 as Model Optimizer's default does.

    `floats` are its weights before rounding. Weights are rounded to the nearest by the largest of
    each output channel, inputs by the largest of all rows of `batches`, fed without padding.

    Raises:
        UnsupportedModel: it leaves one of the maps in floats.
    """
    document, tensors = shrunk(
        prepared.source.module, prepared.program, prepared.structure, allocation, floats
    )
    module = quantised(rebuild(prepared.source.blank(), document, tensors), batches)
    found = replace(floats, maps=dict(floats.maps))
    for site in prepared.structure.sites:
        if not allocation.levels[site.name].numeric.startswith("int8"):
            continue
        for path in site.maps:
            if path in floats.maps and prepared.calls[path].rounds:
                found.maps[path] = _state(path, floats.maps[path], module)
    return found


def quantised(module: nn.Module, batches: Sequence[Feeds]) -> nn.Module:
    """The module in Model Optimizer's simulation of its INT8 default, calibrated on the batches."""
    mtq = _modelopt()

    def forward_loop(model: nn.Module) -> None:
        with torch.no_grad():
            for row in unpadded(batches):
                model(**row)

    with hush():  # it prints what it inserts
        made: nn.Module = mtq.quantize(module, mtq.INT8_DEFAULT_CFG, forward_loop)
    return made


def unpadded(batches: Sequence[Feeds]) -> list[Feeds]:
    """Every row by itself, as long as its mask says."""
    rows = []
    for batch in batches:
        held = batch.get("attention_mask")
        for i in range(len(next(iter(batch.values())))):
            n = None if held is None else int(held[i].sum())
            rows.append(
                {k: v[i : i + 1] if n is None else v[i : i + 1, :n] for k, v in batch.items()}
            )
    return rows


def _state(path: str, floats: MapState, module: nn.Module) -> MapState:
    """One map with the ranges that Model Optimizer found for it."""
    found = module.get_submodule(path)
    rows, inputs = _largest(found, "weight_quantizer"), _largest(found, "input_quantizer")
    if not isinstance(found, nn.Linear) or rows is None or inputs is None:
        raise UnsupportedModel(
            f"Model Optimizer leaves {path} in floats. Use --quantizer zipc, or --exclude {path}."
        )
    scale = rows.flatten().clamp_min(1e-12) / FULL  # (out,)
    values = (floats.weight / scale[:, None]).round().clamp(-FULL, FULL).to(torch.int8)
    integer = QuantizedWeight(values, scale)
    at = ActivationRange(max(float(inputs) / FULL, 1e-12), 128)
    return MapState(integer.dequantized(), floats.bias, STATIC, integer, at, floats.pattern)


def _largest(module: nn.Module, quantizer: str) -> Tensor | None:
    """What a quantizer of a module maps to the largest integer; None if there is none at work."""
    held = getattr(module, quantizer, None)
    return held.amax if held is not None and held.is_enabled else None


def _modelopt() -> Any:
    """Model Optimizer's quantization.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with hush():  # it warns of versions it was not tested with
            from modelopt.torch import quantization
    except ImportError as error:
        raise UsageError(
            "--quantizer modelopt needs NVIDIA's Model Optimizer, which is not installed "
            f"({error}). Run: pip install 'zipc[modelopt]'"
        ) from error
    return quantization
