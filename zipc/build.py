"""An allocation made real: the ONNX graph that ships and the checkpoint that goes with it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from zipc.core.errors import ExportMismatch
from zipc.core.types import Allocation, Workload
from zipc.exporters.onnx_export import check_parity
from zipc.exporters.specialise import Edit, Int8Weights, count_integer_kernels, specialise
from zipc.model_source import build_module
from zipc.numerics.int8 import STATIC
from zipc.prepare import Prepared
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner, one_line
from zipc.pruner.graph.surgery import apply_structure_, describe
from zipc.pruner.levels import LinearState, SiteState, variant_of

FP32_BOUND = 1e-4  # norm of ONNX minus torch, relative to torch
# Where activations are rounded, single ties fall the other way, and after a few layers two correct
# runs differ by as much as rounding itself changes the output; a wrong graph differs by about 1.
INT8_BOUND = 3e-1


States = Mapping[str, SiteState]


@dataclass(frozen=True, slots=True)
class Built:
    """A deployable graph, and how far it is from the torch simulation on an example."""

    allocation: Allocation
    states: States  # the weights in it, by site
    model: bytes
    parity: float
    integer_products: int


def dense_model(prepared: Prepared) -> bytes:
    """The dense reference, through the same path as every compiled graph."""
    return specialise(prepared.dense, Edit()).to_bytes()


def build(
    prepared: Prepared, allocation: Allocation, states: States, *, workload: Workload
) -> Built:
    """Emit the graph of an allocation and check it.

    Raises:
        ExportMismatch: ONNX Runtime disagrees with the torch simulation, or would not run the
            integer kernels the graph was written for.
    """
    model = specialise(prepared.dense, _edit(states)).to_bytes()
    integers = sum(
        sum(1 for c in prepared.program.linears if c.module == module)
        for module, linear in _linears(states).items()
        if linear.integer is not None
    )
    if integers:
        found = integer_kernels(model)
        if found < integers:
            raise ExportMismatch(
                f"ONNX Runtime runs {found} of {integers} integer products of the graph as "
                "integers: the rest would be slower than fp32. Use --numerics fp32."
            )
    example = prepared.source.example(batch=1, length=min(32, prepared.source.max_length))
    expected, _ = prepared.executor.run(example, variant_of(allocation, states))
    runner = OnnxRuntimeRunner(model, workload=workload)
    outputs = runner.outputs({k: v.numpy() for k, v in example.items()})
    parity = check_parity(
        [outputs[name] for _, name in prepared.source.outputs],
        [t.numpy() for t in expected],
        bound=INT8_BOUND if integers else FP32_BOUND,
        what="the compiled ONNX graph against its torch simulation",
    )
    return Built(allocation, states, model, parity, integers)


def integer_kernels(model: bytes | Path) -> int:
    """Integer products in the graph as ONNX Runtime optimises it under default options.

    Raises:
        ExportMismatch: ONNX Runtime cannot load the graph.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(path)
        source = str(model) if isinstance(model, Path) else model
        try:
            onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base
            name = str(model) if isinstance(model, Path) else "the graph"
            raise ExportMismatch(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {name}: {one_line(error)}. "
                "Export it again, or install the ONNX Runtime it was made for."
            ) from error
        return count_integer_kernels(onnx.load(path, load_external_data=False).graph.node)


def checkpoint(
    prepared: Prepared, allocation: Allocation, states: States
) -> tuple[dict[str, Any], dict[str, Tensor], nn.Module]:
    """The structure document, the tensors, and the module they make (already reloaded once).

    Raises:
        ExportMismatch: the rebuilt module disagrees with the simulation the search scored.
    """
    linears = _linears(states)
    source = prepared.source
    sites = [s for s in prepared.structure.sites if s.name in allocation.levels]
    document = describe(
        source.module,
        sites,
        widths={n: lv.width for n, lv in allocation.levels.items()},
        numerics={m: s.numeric for m, s in linears.items() if s.integer is not None},
    )
    tensors = {n: t.detach() for n, t in source.module.state_dict().items()}
    for name, state in states.items():
        site = prepared.sites[name]
        for path in (*site.producers, *(c.module for c in site.consumers)):
            for leaf in ("weight", "bias"):
                tensors.pop(f"{path}.{leaf}", None)
        for consumer, constant in state.constants.items():
            tensors[f"{consumer}.bias"] = constant
        tensors |= state.tensors
    for path, linear in linears.items():
        tensors |= _linear_tensors(path, linear)
    module = rebuild(source.config, document, tensors)
    example = source.example(batch=1, length=min(32, source.max_length))
    expected, _ = prepared.executor.run(example, variant_of(allocation, states))
    with torch.no_grad():
        result = module(**example)
    check_parity(
        [result[name].numpy() for _, name in source.outputs],
        [t.numpy() for t in expected],
        bound=FP32_BOUND if not any(s.integer for s in linears.values()) else INT8_BOUND,
        what="the rebuilt checkpoint against the simulation",
    )
    return document, tensors, module


def rebuild(config: Any, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module from a config, a structure document and its tensors."""
    module = build_module(config).float()  # a config may name a half precision
    apply_structure_(module, document)
    module.load_state_dict(dict(tensors), strict=True)
    return module.eval().requires_grad_(False)


def _linears(states: States) -> dict[str, LinearState]:
    return {m: linear for state in states.values() for m, linear in state.linears.items()}


def _edit(states: States) -> Edit:
    tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    removed: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    integers: dict[str, Int8Weights] = {}
    for state in states.values():
        removed |= {m: c.numpy() for m, c in state.constants.items()}
        tensors |= {p: t.numpy() for p, t in state.tensors.items()}
    for module, linear in _linears(states).items():
        if linear.bias is not None:
            tensors[module + ".bias"] = linear.bias.numpy()
        if linear.integer is None:
            tensors[module + ".weight"] = linear.weight.numpy()
            continue
        at = linear.activation
        integers[module] = Int8Weights(
            linear.integer.values.numpy(),
            linear.integer.scale.numpy(),
            None if at is None else (at.scale, at.zero_point),
        )
    return Edit(tensors, removed, integers)


def _linear_tensors(path: str, linear: LinearState) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if linear.bias is not None:
        found[f"{path}.bias"] = linear.bias
    if linear.integer is None:
        found[f"{path}.weight"] = linear.weight
        return found
    found[f"{path}.weight"] = linear.integer.values
    found[f"{path}.weight_scale"] = linear.integer.scale
    if linear.numeric == STATIC and linear.activation is not None:
        found[f"{path}.input_scale"] = torch.tensor(linear.activation.scale)
        found[f"{path}.input_zero_point"] = torch.tensor(linear.activation.zero_point)
    return found
