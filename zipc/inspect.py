"""Look before compiling: what in a model can be removed, and what an ONNX file holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx

from zipc.core.errors import UsageError, ZipcError
from zipc.core.figures import three_digits
from zipc.core.request import Request
from zipc.core.types import InputSpec, Progress, Silent, Site
from zipc.exporters.onnx_export import export_dense
from zipc.exporters.sparse_weights import sparse_weights
from zipc.model_source import SourceModel, load_source, settle, trace_source
from zipc.onnx_file import bytes_of
from zipc.prepare import discover
from zipc.profiler.runners.apart import TimingProcess
from zipc.pruner.graph.sites import Structure
from zipc.pruner.graph.trace import Program
from zipc.pruner.ladder import widths_of
from zipc.runtimes import integer_kernels
from zipc.shares import dense_shares
from zipc.targets import load_target


def inspect_model(
    model: str,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    target: str = "cpu",
    weights: str | None = None,
    input_shapes: Sequence[InputSpec] = (),
    measure: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sites, units, legal widths and consumers of MODEL, and what was left alone and why.

    No data is needed; a folder without a tokenizer will do. With `measure`, the dense model is
    exported and timed on this machine, and so is the surroundings of every kind of site; where
    that cannot be, the shares of the latency are None and a note says why.

    Raises:
        UsageError: the model cannot be found or read.
        UnsupportedModel: it cannot be traced.
    """
    progress = progress or Silent()
    progress.stage("trace")
    step = load_target(target).width_step
    request = Request(model=model, weights=weights, input_shapes=tuple(input_shapes))
    source = load_source(model, weights=weights, input_shapes=input_shapes)
    request = settle(request, source)
    architecture = type(source.module).__name__
    program = trace_source(source, batch=request.batch_size)
    structure = discover(source, program, include=include, exclude=exclude)
    progress.done(f"{len(structure.sites)} sites, {len(structure.left_alone)} left alone")
    sizes = {name: tensor.numel() for name, tensor in program.tensors.values()}
    parameters = sum(p.numel() for p in source.module.parameters())
    dense_ms: float | None = None
    shares: dict[str, float] = {}
    if measure and structure.sites:
        dense_ms, shares = _measured(source, program, structure, request, progress)
    return {
        "model": source.source,
        "sha256": source.sha256,
        "revision": source.revision,
        "architecture": architecture,
        "parameters": parameters,
        "workload": str(request.workload),
        "latency_ms": dense_ms,
        "inputs": source.inputs,
        "input_shapes": {spec.name: list(spec.shape) for spec in source.specs},
        "outputs": [name for _, name in source.outputs],
        "max_length": source.max_length or None,
        "sites": [
            _site(site, sizes, step, parameters, shares.get(site.name)) for site in structure.sites
        ],
        "left_alone": [{"path": a.path, "reason": a.reason} for a in structure.left_alone],
        "notes": source.notes,
    }


def inspect_onnx(path: Path) -> dict[str, Any]:
    """Operators, opset, size, integer products and 2:4 weights of an ONNX file.

    Integer products are counted in the graph as ONNX Runtime optimises it under default options:
    what really runs on integers, not what is written as quantised. Of the constant weights of
    products, `eligible` ones are such that sparse kernels take them, and `conforming` ones are
    eligible and have the 2:4 pattern.

    Raises:
        UsageError: the file is missing or is no ONNX file.
        ExportMismatch: ONNX Runtime cannot load it.
    """
    if not path.is_file():
        raise UsageError(f"There is no ONNX file at {path}.")
    size = bytes_of(path)
    proto = onnx.load(path, load_external_data=False)
    ops = Counter(node.op_type for node in proto.graph.node)
    weights = {tensor.name: prod(tensor.dims) for tensor in proto.graph.initializer}
    return {
        "file": str(path),
        "size_mb": size / 1e6,
        "ir_version": proto.ir_version,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "inputs": {v.name: _shape(v) for v in proto.graph.input if v.name not in weights},
        "outputs": {v.name: _shape(v) for v in proto.graph.output},
        "parameters": sum(weights.values()),
        "nodes": sum(ops.values()),
        "ops": dict(ops.most_common()),
        "integer_products": integer_kernels(path),
        "sparsity_2:4": _sparsity(proto, path.parent),
    }


def _sparsity(proto: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    found = sparse_weights(proto, folder=folder)
    eligible = [w for w in found if w.obstacle is None]
    return {
        "weights": len(found),
        "eligible": len(eligible),
        "conforming": sum(w.conforms for w in eligible),
        "dense": [w.name for w in eligible if not w.conforms],
        "not_eligible": [{"weight": w.name, "reason": w.obstacle} for w in found if w.obstacle],
    }


def _measured(
    source: SourceModel,
    program: Program,
    structure: Structure,
    request: Request,
    progress: Progress,
) -> tuple[float | None, dict[str, float]]:
    """Milliseconds of the dense model and the share of each site; a note where there are none."""
    progress.stage("export and time")
    try:
        dense = export_dense(
            program.exported, source.example(), outputs=source.outputs, dynamic=source.dynamic
        )
        found = dense_shares(dense, structure.sites, request.workload, TimingProcess("onnxruntime"))
    except ZipcError as error:
        source.notes.append(f"the latency was not measured: {error}")
        progress.done("not possible")
        return None, {}
    dense_ms, shares = found
    if not shares:
        source.notes.append(
            "no shares of the latency: with what lies around it, a site by itself takes longer "
            f"than the whole model, {three_digits(dense_ms)} ms"
        )
    if sum(shares.values()) > 1:
        source.notes.append(
            "shares of the time overlap: each is that of a site with the normalisation and the "
            "residual sum around it"
        )
    progress.done(f"{three_digits(dense_ms)} ms")
    return found


def _site(
    site: Site, sizes: dict[str, int], step: int, parameters: int, share: float | None
) -> dict[str, Any]:
    inside = tuple(f"{module}." for expert in site.experts for module in expert.modules)
    held = {s.parameter for s in site.slices}.union(n for n in sizes if n.startswith(inside))
    own = sum(sizes[name] for name in held)
    return {
        "name": site.name,
        "kind": site.kind,
        "units": site.units,
        "widths": widths_of(site, step=step),
        "parameters": own,
        "parameter_share": own / parameters,
        "latency_share": share,
        "calls": site.calls,
        "producers": list(site.producers),
        "consumers": [c.module for c in site.consumers],
    }


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
