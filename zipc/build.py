"""An allocation made real: the ONNX graph that ships and the checkpoint that goes with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from zipc.core.errors import ExportMismatch
from zipc.core.types import Allocation, Difference, Workload
from zipc.exporters.onnx_export import check_parity
from zipc.exporters.shapes import SizeOf
from zipc.exporters.sparse_weights import sparse_weights
from zipc.exporters.specialise import Edit, Int8Weights
from zipc.integer_body import IntegerBody
from zipc.numerics.bf16 import BF16
from zipc.numerics.int8 import STATIC
from zipc.prepare import Prepared
from zipc.pruner.graph.sites import Structure, sizes_at
from zipc.pruner.graph.surgery import apply_structure_, describe
from zipc.pruner.graph.trace import MapCall, Program
from zipc.pruner.maps import matrices
from zipc.pruner.states import MapState, States, variant_of

FP32_BOUND = 1e-4  # norm of ONNX minus torch, relative to torch
# Where activations are rounded, single ties fall the other way, and after a few layers two correct
# runs differ by as much as rounding itself changes the output; a wrong graph differs by about 1.
INT8_BOUND = 3e-1


@dataclass(frozen=True, slots=True)
class Built:
    """A deployable graph, and how far it is from the torch simulation on an example."""

    allocation: Allocation
    states: States  # the weights in it
    model: bytes
    parity: float
    integer_products: int
    sparse_weights: int  # in the 2:4 pattern, as asked for


def dense_model(prepared: Prepared) -> bytes:
    """The dense reference, through the same path as every compiled graph."""
    return prepared.timed(prepared.dense, Edit())


def build(
    prepared: Prepared, allocation: Allocation, states: States, *, workload: Workload
) -> Built:
    """Emit the graph of an allocation and check it.

    Raises:
        ExportMismatch: the runtime disagrees with the torch simulation, or would not run the
            integer kernels the graph was written for.
    """
    floats = build_floats(prepared, allocation, states, workload=workload)
    if prepared.body is None:
        return floats
    return in_integers(prepared, floats, prepared.body, workload=workload)


def build_floats(
    prepared: Prepared, allocation: Allocation, states: States, *, workload: Workload
) -> Built:
    """Emit the graph of an allocation, whole networks in floats, and check it.

    Raises:
        ExportMismatch: see `build`.
    """
    edit = edit_of(states, sizes_at(prepared.structure, allocation.widths))
    model = prepared.specialise(prepared.dense, edit).to_bytes()
    runtime = prepared.runtime
    held = [states.maps[c.module] for c in prepared.program.maps if c.module in states.maps]
    integers = sum(state.integer is not None for state in held)
    halved = sum(state.numeric == BF16 for state in held)
    narrow: dict[Difference, int] = {"int8": integers, "bf16": halved}
    found = runtime.narrow_products(model) if any(narrow.values()) else {}
    for numeric, count in narrow.items():
        if found.get(numeric, 0) < count:
            raise ExportMismatch(
                f"{runtime.title} runs {found.get(numeric, 0)} of {count} products of the graph in "
                f"{numeric}: the rest would be no faster than fp32. Use --numerics fp32."
            )
    sparse = sum(state.pattern != "dense" for state in states.maps.values())
    if sparse:
        weights = sparse_weights(onnx.load_from_string(model), folder=Path())
        conforming = sum(weight.conforms for weight in weights)
        if conforming < sparse:
            raise ExportMismatch(
                f"{conforming} of {sparse} weights are in the 2:4 pattern in the graph: sparse "
                "kernels would not take the rest. Use --pattern none."
            )
    example = prepared.example(batch=1, length=32, widths=allocation.widths)
    expected, _ = prepared.executor.run(example, variant_of(allocation, states))
    runner = runtime.runner(model, workload=workload)
    outputs = runner.outputs(prepared.for_graph(example))
    parity = check_parity(
        [outputs[name] for _, name in prepared.source.outputs],
        [t.numpy() for t in expected],
        bound=INT8_BOUND if integers or halved else FP32_BOUND,
        what="the compiled ONNX graph against its torch simulation",
    )
    return Built(allocation, states, model, parity, integers, sparse)


def in_integers(
    prepared: Prepared, floats: Built, body: IntegerBody, *, workload: Workload
) -> Built:
    """The same network in INT8 as a whole.

    Raises:
        ExportMismatch: it is far from the one in floats, or no product of it runs on integers.
    """
    integer = body.emit(floats.model)
    runtime = prepared.runtime
    integers = runtime.narrow_products(integer)["int8"]
    if not integers:
        raise ExportMismatch(
            f"{runtime.title} runs no product of the graph as integers. Use --numerics fp32."
        )
    models, feeds = (integer, floats.model), body.batches[0]
    both = [runtime.runner(m, workload=workload).outputs(feeds) for m in models]
    names = [name for _, name in prepared.source.outputs]
    try:
        parity = check_parity(
            *([found[name] for name in names] for found in both),
            bound=INT8_BOUND,
            what="the graph in INT8 against the same in floats",
        )
    except ExportMismatch as error:
        raise ExportMismatch(f"{error}. Use --numerics fp32.") from error
    return replace(floats, model=integer, parity=parity, integer_products=integers)


def checkpoint(
    prepared: Prepared, allocation: Allocation, states: States
) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module]:
    """The structure document, the tensors, and the module they make (already reloaded once).

    Convolutions in INT8 are kept as the floats that their weights stand for.

    Raises:
        ExportMismatch: the rebuilt module disagrees with the simulation the search scored.
    """
    source = prepared.source
    floats = {
        m: replace(s, numeric="fp32", integer=None, activation=None)
        for m, s in states.maps.items()
        if prepared.calls[m].convolution
    }
    states = replace(states, maps=states.maps | floats)
    own, structure = source.module, prepared.structure
    blank, recipe = source.blank, source.recipe
    uncut = {n for n, lv in allocation.levels.items() if lv.width == prepared.sites[n].units}
    written = source.written
    if written is not None and written.stays.intersection(allocation.levels) <= uncut:
        own, blank, recipe = written.module, written.blank, written.recipe
        structure = replace(structure, attributes=written.attributes)
    document, tensors = shrunk(own, prepared.program, structure, allocation, states)
    document["source"] = recipe
    module = rebuild(blank(), document, tensors)
    example = prepared.example(batch=1, length=32, widths=allocation.widths)
    expected, _ = prepared.executor.run(example, variant_of(allocation, states))
    with torch.no_grad():
        result = module(**example)
    check_parity(
        [t.numpy() for t in source.chosen(result)],
        [t.numpy() for t in expected],
        bound=INT8_BOUND if document["numerics"] else FP32_BOUND,
        what="the rebuilt checkpoint against the simulation",
    )
    return document, tensors, module


def shrunk(
    module: nn.Module,
    program: Program,
    structure: Structure,
    allocation: Allocation,
    states: States,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The structure document of an allocation and all tensors of the module it describes."""
    calls = {c.module: c for c in program.maps}
    document = describe(
        module,
        program,
        structure,
        widths=allocation.widths,
        numerics={m: s.numeric for m, s in states.maps.items() if s.numeric != "fp32"},
        biased=[m for m, s in states.maps.items() if s.bias is not None and not calls[m].bias],
        untied=_untied(module, calls, states),
        dropped=states.dropped,
    )
    tensors = {n: t.detach() for n, t in module.state_dict().items()}
    for path in (*states.maps, *document["stubs"]):
        for leaf in ("weight", "bias"):
            tensors.pop(f"{path}.{leaf}", None)
    tensors |= states.tensors
    for path in document["stubs"]:
        if path in states.constants:
            tensors[f"{path}.bias"] = states.constants[path]
    for path, state in states.maps.items():
        tensors |= _map_tensors(calls[path], state)
    gone = tuple(f"{path}." for path in states.dropped)
    return document, {n: t for n, t in tensors.items() if not n.startswith(gone)}


def _untied(module: nn.Module, calls: Mapping[str, MapCall], states: States) -> list[str]:
    """Maps with other values in floats than what their weight is tied to."""
    dense = dict(module.named_parameters(remove_duplicate=False))
    holders = Counter(id(parameter) for parameter in dense.values())
    return [
        path
        for path, state in states.maps.items()
        if state.integer is None
        and holders[id(weight := dense[calls[path].weight])] > 1
        and not torch.equal(weight, state.weight)
    ]


def rebuild(
    module: nn.Module, document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A blank module, cut to a structure document and filled with its tensors."""
    module.float()  # a config may name a half precision
    apply_structure_(module, document)
    module.load_state_dict(dict(tensors), strict=True)
    return module.eval().requires_grad_(False)


def edit_of(states: States, size_of: SizeOf) -> Edit:
    """The changes of the dense graph that give it these weights."""
    tensors = {p: t.numpy() for p, t in states.tensors.items()}
    integers: dict[str, Int8Weights] = {}
    narrow = [m for m, s in states.maps.items() if s.numeric == BF16]
    for module, state in states.maps.items():
        if state.bias is not None:
            tensors[module + ".bias"] = state.bias.numpy()
        if state.integer is None:
            tensors[module + ".weight"] = state.weight.numpy()
            continue
        at = state.activation
        values = state.integer.values
        integers[module] = Int8Weights(
            (values.view_as(state.weight) if state.weight.dim() > 2 else values).numpy(),
            state.integer.scale.numpy(),
            None if at is None else (at.scale, at.zero_point),
        )
    removed = {m: c.numpy() for m, c in states.constants.items()}
    return Edit(tensors, removed, integers, size_of, states.picks, states.silent, narrow)


def _map_tensors(call: MapCall, state: MapState) -> dict[str, Tensor]:
    """The tensors of a map in a checkpoint; those of a narrow one lie (out, in)."""
    found: dict[str, Tensor] = {}
    path = call.module
    if state.bias is not None:
        found[f"{path}.bias"] = state.bias
    if state.integer is None:
        found[f"{path}.weight"] = state.weight
        if state.numeric == BF16:
            found[f"{path}.weight"] = matrices(call, state.weight)[0].to(torch.bfloat16)
        return found
    found[f"{path}.weight"] = state.integer.values
    found[f"{path}.weight_scale"] = state.integer.scale
    if state.numeric == STATIC and state.activation is not None:
        found[f"{path}.input_scale"] = torch.tensor(state.activation.scale)
        found[f"{path}.input_zero_point"] = torch.tensor(state.activation.zero_point)
    return found
