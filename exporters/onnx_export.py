"""Torch to ONNX: one export of the dense module; everything after it edits that graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from zipc.core.errors import ExportMismatch, UnsupportedModel
from zipc.core.quiet import hush
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.passes import clean

OPSET = 20  # the first with Gelu as one operator


def export_dense(
    exported: torch.export.ExportedProgram,
    example: Mapping[str, Tensor],
    *,
    outputs: Sequence[tuple[int, str]],
    dynamic: Mapping[str, Mapping[int, str]],
) -> OnnxGraph:
    """Export to standard-domain ONNX with the named axes symbolic, cleaned by our passes.

    `outputs` are (index in the traced outputs, public name). Inputs keep their torch names.

    Raises:
        UnsupportedModel: an operation has no ONNX translation; names it.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.scaled_dot_product_attention.default: _attention
    }
    try:
        with hush():
            program = torch.onnx.export(
                exported,
                (),
                kwargs=dict(example),
                optimize=False,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=table,
            )
            assert program is not None
            raw = program.model_proto
            transposed = _transposed_weights(raw)
            program.optimize()
            proto = program.model_proto
    except Exception as error:  # the exporter raises many unrelated types
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UnsupportedModel(
            f"The model cannot be exported to ONNX: {type(error).__name__}: {first}"
        ) from error
    _name_axes(proto, dynamic)
    graph = OnnxGraph.of(proto)
    _part_equal_weights_(graph, raw, transposed)
    _keep_outputs(graph, outputs)
    for initializer in graph.arrays:
        parameter = transposed.get(initializer, initializer)
        graph.weights[parameter] = (initializer, initializer in transposed)
    clean(graph)
    return graph


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q k' scale + mask) v, as the five operators every runtime has kernels for."""
    from onnxscript import opset20

    op: Any = opset20  # its type variables know no traced values

    if is_causal or enable_gqa:
        raise UnsupportedModel("causal and grouped-query attention are not exported yet")
    factor = float(scale) if scale is not None else 1.0 / math.sqrt(query.shape[-1])
    scores = op.MatMul(
        op.Mul(query, op.Constant(value_float=factor)), op.Transpose(key, perm=[0, 1, 3, 2])
    )
    if attn_mask is not None:
        if attn_mask.dtype is not None and int(attn_mask.dtype) == onnx.TensorProto.BOOL:
            attn_mask = op.Where(
                attn_mask, op.Constant(value_float=0.0), op.Constant(value_float=-1e9)
            )
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _transposed_weights(proto: onnx.ModelProto) -> dict[str, str]:
    """Value name -> parameter, for `Transpose(parameter)` nodes the optimiser will fold."""
    known = {t.name for t in proto.graph.initializer}
    return {
        n.output[0]: n.input[0]
        for n in proto.graph.node
        if n.op_type == "Transpose" and n.input[0] in known
    }


def _part_equal_weights_(
    graph: OnnxGraph, raw: onnx.ModelProto, transposed: Mapping[str, str]
) -> None:
    """Give each parameter one initialiser of its own, so that it can be edited alone.

    The optimiser merges initialisers of equal value (fresh biases, say), and stores a weight twice
    where it is used by a MatMul and by a Gemm.
    """
    values = {t.name: t for t in raw.graph.initializer}
    before = {n.output[0]: n for n in raw.graph.node}
    names = {_parameter(n, transposed): n for n in graph.arrays}
    for node in graph.nodes:
        was = before.get(node.output[0])
        if was is None or was.op_type != node.op_type:
            continue
        for i, (new, old) in enumerate(zip(node.input, was.input, strict=False)):
            wanted = _parameter(old, transposed)
            if new not in graph.arrays or wanted[0] not in values:
                continue
            if wanted == _parameter(new, transposed):
                continue
            value = numpy_helper.to_array(values[wanted[0]])
            if np.array_equal(graph.arrays[new], value.T if wanted[1] else value):
                node.input[i] = names.setdefault(wanted, old)
                graph.arrays[node.input[i]] = graph.arrays[new]
    stored = {p: i for i, p in transposed.items() if i in graph.arrays and p in graph.arrays}
    for node in graph.nodes:
        if node.op_type == "Gemm" and node.input[1] in stored:
            node.input[1] = stored[node.input[1]]
            for attribute in node.attribute:
                if attribute.name == "transB":
                    attribute.i = 1 - attribute.i


def _parameter(name: str, transposed: Mapping[str, str]) -> tuple[str, bool]:
    """The parameter an initialiser stands for, and whether it is stored transposed."""
    return transposed.get(name, name), name in transposed


def _name_axes(proto: onnx.ModelProto, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """Rename the exporter's symbols to the names of the axes."""
    names: dict[str, str] = {}
    for given in proto.graph.input:
        for axis, name in dynamic.get(given.name, {}).items():
            symbol = given.type.tensor_type.shape.dim[axis].dim_param
            if symbol:
                names[symbol] = name
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _keep_outputs(graph: OnnxGraph, outputs: Sequence[tuple[int, str]]) -> None:
    old = list(graph.proto.graph.output)
    del graph.proto.graph.output[:]
    for index, name in outputs:
        value = onnx.ValueInfoProto()
        value.CopyFrom(old[index])
        before, value.name = value.name, name
        graph.proto.graph.output.append(value)
        for node in graph.nodes:
            for i, output in enumerate(node.output):
                if output == before:
                    node.output[i] = name
            for i, source in enumerate(node.input):
                if source == before:
                    node.input[i] = name
        graph.shapes[name] = graph.shapes[before]
        graph.types[name] = graph.types[before]


def check_parity(
    actual: Sequence[np.ndarray[Any, Any]],
    expected: Sequence[np.ndarray[Any, Any]],
    *,
    bound: float,
    what: str,
) -> float:
    """Norm of the difference relative to the norm of what was expected, the worst output's.

    The norm, not the largest element: where activations are rounded, a tie that falls the other
    way moves single elements by a whole step.

    Raises:
        ExportMismatch: it is above `bound`, or a shape differs, or a value is not finite.
    """
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            raise ExportMismatch(f"{what}: shape {a.shape} against {e.shape}")
        if not np.isfinite(a).all():
            raise ExportMismatch(f"{what}: it gives NaN or infinity")
        worst = max(worst, float(np.linalg.norm(a - e)) / max(float(np.linalg.norm(e)), 1e-12))
    if worst > bound:
        raise ExportMismatch(f"{what}: relative difference {worst:.2e} is above {bound:.0e}")
    return worst


__all__ = ["OPSET", "check_parity", "export_dense"]
