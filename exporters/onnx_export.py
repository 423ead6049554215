"""Torch to ONNX: one export of the dense module; everything after it edits that graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from zipc.core.errors import ExportMismatch, UnsupportedModel
from zipc.core.nodes import editable
from zipc.core.quiet import hush
from zipc.exporters.graph import Array, OnnxGraph, transposes
from zipc.exporters.origin import origin_of
from zipc.exporters.passes import clean
from zipc.exporters.translate import repair_, translations

OPSET = 20  # the first with Gelu as one operator


def export_dense(
    exported: torch.export.ExportedProgram,
    example: Mapping[str, Tensor],
    *,
    outputs: Sequence[tuple[int, str]],
    dynamic: Mapping[str, Mapping[int, str]],
    inputs: Mapping[str, str] | None = None,
) -> OnnxGraph:
    """Export to standard-domain ONNX with the named axes symbolic, cleaned by our passes.

    `outputs` are (index in the traced outputs, public name), `inputs` the public names of those
    that do not keep their torch name.

    Raises:
        UnsupportedModel: an operation has no ONNX translation; names it.
    """
    try:
        with hush():
            program = torch.onnx.export(
                exported,
                (),
                kwargs=dict(example),
                optimize=False,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=translations(),
            )
            assert program is not None
            assert program.exported_program is not None
            origin = origin_of(program.exported_program, exported)
            parameters, names = _set_aside_(program, _editable(exported))
            repair_(program.model)
            program.optimize()
            proto = program.model_proto
    except Exception as error:  # the exporter raises many unrelated types
        raise UnsupportedModel(f"The model cannot be exported to ONNX: {_reason(error)}") from error
    _name_axes(proto, dynamic)
    graph = OnnxGraph.of(proto)
    graph.origin, graph.results = origin.of(graph.nodes), origin.results(graph.nodes)
    _drop_metadata_(graph)
    _put_back_(graph, parameters, names)
    _keep_outputs(graph, outputs)
    _rename_inputs(graph, inputs or {})
    clean(graph)
    return graph


def _reason(error: BaseException) -> str:
    """The innermost cause: the exporter wraps it in advice that names its own files."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"


def _editable(exported: torch.export.ExportedProgram) -> list[list[str]]:
    """Names of the tensors that pruning may edit.

    Those of one tensor (a tied weight) come together.
    """
    signature = exported.graph_signature
    named = {*signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values()}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in exported.state_dict.items():
        if name in named and editable(tensor):
            place = tensor.data_ptr() or id(tensor)  # meta tensors lie nowhere
            same = place, tensor.shape, tensor.stride()
            groups.setdefault(same, []).append(name)
    return list(groups.values())


def _set_aside_(
    program: torch.onnx.ONNXProgram, groups: list[list[str]]
) -> tuple[dict[str, Array], dict[str, str]]:
    """Make parameters inputs of the graph, so that the optimiser can neither fold nor merge them.

    Folded into a constant, or merged with another of equal value, a parameter could not be edited
    alone. Returns one array per tensor and, for every name, that of the array.
    """
    graph = program.model.graph
    held: dict[str, Array] = {}
    names: dict[str, str] = {}
    for group in groups:
        present = [n for n in group if n in graph.initializers]
        for name in present:
            value = graph.initializers.pop(name)
            assert value.const_value is not None
            held.setdefault(present[0], value.const_value.numpy())
            value.const_value = None
            graph.inputs.append(value)
        if present:
            names |= dict.fromkeys(group, present[0])
    return held, names


def _put_back_(graph: OnnxGraph, parameters: Mapping[str, Array], names: Mapping[str, str]) -> None:
    """Make the parameters initialisers again, transposed where every use of one transposes it."""
    given = [i for i in graph.proto.graph.input if i.name not in names]
    del graph.proto.graph.input[:]
    graph.proto.graph.input.extend(given)
    for node in graph.nodes:
        for i, source in enumerate(node.input):
            node.input[i] = names.get(source, source)
    consumers = graph.consumers()
    turned: set[str] = set()
    for name, value in parameters.items():
        if all(transposes(n) for n in consumers.get(name, [])) and name in consumers:
            turned.add(name)
        graph.arrays[name] = value.T if name in turned else value
    graph.weights = {n: (stored, stored in turned) for n, stored in names.items()}
    gone = {n.output[0]: n.input[0] for n in graph.nodes if n.input[:1] and n.input[0] in turned}
    graph.nodes = [n for n in graph.nodes if n.output[0] not in gone]
    for node in graph.nodes:
        for i, source in enumerate(node.input):
            node.input[i] = gone.get(source, source)


def _drop_metadata_(graph: OnnxGraph) -> None:
    """Drop what the exporter notes for itself, such as stack traces."""
    model = graph.proto
    for noted in (model, model.graph, *model.graph.input, *model.graph.output, *graph.nodes):
        del noted.metadata_props[:]


def _name_axes(proto: onnx.ModelProto, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """Rename the exporter's symbols to the names of the axes, in expressions of them too."""
    names: dict[str, str] = {}
    for given in proto.graph.input:
        for axis, name in dynamic.get(given.name, {}).items():
            symbol = given.type.tensor_type.shape.dim[axis].dim_param
            if symbol:
                names[symbol] = name
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            parts = re.sub(r"[A-Za-z_]\w*", lambda at: names.get(at[0], at[0]), dim.dim_param)
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, parts)


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
        graph.results = {n: name if v == before else v for n, v in graph.results.items()}
        if before in graph.origin:
            graph.origin[name] = graph.origin[before]


def _rename_inputs(graph: OnnxGraph, names: Mapping[str, str]) -> None:
    for value in graph.proto.graph.input:
        before, after = value.name, names.get(value.name, value.name)
        graph.shapes[after], graph.types[after] = graph.shapes[before], graph.types[before]
        graph.results[before] = value.name = after
    for node in graph.nodes:
        for i, source in enumerate(node.input):
            node.input[i] = names.get(source, source)


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


def serialised(graph: onnx.GraphProto) -> bytes:
    """A graph made by hand as the bytes of a file, readable from the oldest runtime on that can."""
    opset = onnx.helper.make_opsetid("", OPSET)
    lowest = onnx.helper.find_min_ir_version_for([opset])
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=lowest)
    return bytes(model.SerializeToString())


__all__ = ["OPSET", "check_parity", "export_dense", "serialised"]
