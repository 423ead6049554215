"""Types for TensorRT: fp16 everywhere but where it would overflow or lose whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference

from zipc.core.errors import ExportMismatch
from zipc.exporters.graph import OnnxGraph, node

FLOAT, HALF = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
LARGEST = 65504.0  # that fp16 holds
SAFE = LARGEST / 2  # on calibration data: other data may reach further
SMALL = 64  # elements up to which constants tell shapes
SUFFIX = {FLOAT: "_fp32", HALF: "_fp16"}
AS_IT_IS = ("Cast", "Shape", "Size", "IsNaN", "IsInf")  # read floats of either type
ALWAYS_FLOAT = {"Resize": (1, 2)}  # inputs that the standard has in fp32 only
SUMS = ("ReduceMean", "ReduceSum", "ReduceL2", "CumSum")
GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
ROUNDINGS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, slots=True)
class Kept:
    """An operator that stays in fp32, and why."""

    node: str
    operator: str
    reason: str


def half_(graph: OnnxGraph, *, maxima: Mapping[str, float]) -> None:
    """Bring a graph in fp32 to fp16; its inputs and outputs keep their types.

    `maxima` are the largest magnitudes of values on calibration data. An operator stays in fp32,
    between Casts, if it reads or gives more than half of what fp16 holds, if it sums along an axis,
    if a constant of it is too large, or if it computes from whole numbers alone: positions lose
    their last digits in fp16. Its `doc_string` says why. Softmax and LayerNormalization are fp16
    outside; TensorRT computes both in fp32.
    """
    types = value_types(graph)
    kept = _reasons(graph, types, maxima)
    _Typing(graph, types, kept).apply_()
    graph.types = value_types(graph)


def kept_in_fp32(graph: OnnxGraph) -> list[Kept]:
    """The operators of an emitted graph that compute in fp32, in their order."""
    return [
        Kept(n.name, n.op_type, n.doc_string)
        for n in graph.to_proto().graph.node
        if n.doc_string and n.op_type != "Cast"
    ]


def value_types(graph: OnnxGraph) -> dict[str, int]:
    """The ONNX type of every value, from the types of what comes in."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    proto.graph.node.extend(graph.ordered())
    for name, array in graph.arrays.items():
        if array.size <= SMALL:
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        else:  # the type is enough, and weights are large
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            proto.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    inferred = shape_inference.infer_shapes(proto).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {v.name: v.type.tensor_type.elem_type for v in values}
    return types | {i.name: i.data_type for i in inferred.initializer}


def _reasons(
    graph: OnnxGraph, types: Mapping[str, int], maxima: Mapping[str, float]
) -> dict[str, str]:
    """First output of an operator that must stay in fp32 -> why."""
    held = {stored for stored, _ in graph.weights.values()}
    counted: set[str] = set()  # computed from whole numbers and constants alone
    largest = dict(maxima)
    kept: dict[str, str] = {}
    for step in graph.ordered():
        if any(a.type in GRAPHS for a in step.attribute):
            raise ExportMismatch(f"{step.name}: TensorRT gets no {step.op_type} with a graph in it")
        if step.op_type in ROUNDINGS:
            largest[step.output[0]] = largest.get(step.input[0], 0.0)
        floats = [i for i in step.input if types.get(i) == FLOAT]
        results = [o for o in step.output if types.get(o) == FLOAT]
        whole = step.op_type not in ROUNDINGS and all(
            i in counted or (i in graph.arrays and i not in held) for i in floats
        )
        if whole:
            counted.update(results)
        beyond = max((largest.get(v, 0.0) for v in (*floats, *results)), default=0.0)
        constants = [graph.arrays[i] for i in floats if i in graph.arrays]
        if step.doc_string:
            kept[step.output[0]] = step.doc_string
        elif not beyond <= SAFE:
            kept[step.output[0]] = f"values reach {beyond:.3g} on calibration data"
        elif whole and floats + results:
            kept[step.output[0]] = "positions and masks: computed from whole numbers"
        elif step.op_type in SUMS:
            kept[step.output[0]] = "a sum along an axis"
        elif step.op_type != "Clip" and any(_beyond(c) for c in constants):
            kept[step.output[0]] = "a constant beyond fp16"
    return kept


def _beyond(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bool:
    finite = array[np.isfinite(array)]
    return bool((np.abs(finite) > LARGEST).any())


class _Typing:
    """Gives every operator its type, with a Cast wherever a value changes hands between two."""

    def __init__(self, graph: OnnxGraph, types: Mapping[str, int], kept: Mapping[str, str]) -> None:
        self.graph = graph
        self.types = types
        self.kept = kept
        self.outputs = set(graph.outputs())
        self.own = dict.fromkeys((i.name for i in graph.proto.graph.input), FLOAT)
        self.casts: dict[str, NodeProto] = {}
        self.arrays = dict(graph.arrays)

    def apply_(self) -> None:
        nodes = self.graph.ordered()
        self.shared = self._read_as(nodes)
        for step in nodes:
            kind = self._kind(step)
            step.doc_string = self.kept.get(step.output[0], "")
            for place, name in enumerate(step.input):
                if self.types.get(name) == FLOAT:
                    step.input[place] = self._read(name, self._wanted(step, place, kind))
            for place, name in enumerate(step.output):
                if self.types.get(name) == FLOAT:
                    self.own[name] = kind
                    if kind == HALF and name in self.outputs:
                        step.output[place] = name + SUFFIX[HALF]
                        self._cast(step.output[place], name, FLOAT)
            if step.op_type == "Cast" and self.types.get(step.output[0]) == FLOAT:
                next(a for a in step.attribute if a.name == "to").i = kind
        self.graph.nodes = [*nodes, *self.casts.values()]
        self.graph.arrays = self.arrays

    def _kind(self, step: NodeProto) -> int:
        return FLOAT if step.output[0] in self.kept else HALF

    def _wanted(self, step: NodeProto, place: int, kind: int) -> int:
        """The type in which an operator reads one of its inputs."""
        if place in ALWAYS_FLOAT.get(step.op_type, ()):
            return FLOAT
        return self.own.get(step.input[place], FLOAT) if step.op_type in AS_IT_IS else kind

    def _read_as(self, nodes: list[NodeProto]) -> set[str]:
        """Initialisers that are read in fp32 by some operator."""
        return {
            name
            for step in nodes
            for place, name in enumerate(step.input)
            if name in self.graph.arrays and self._wanted(step, place, self._kind(step)) == FLOAT
        }

    def _read(self, name: str, kind: int) -> str:
        """The name under which a value can be read in a type."""
        held = self.graph.arrays.get(name)
        if held is not None:
            if kind == FLOAT:
                return name
            stored = name + SUFFIX[HALF] if name in self.shared else name
            self.arrays[stored] = held.clip(-LARGEST, LARGEST).astype(np.float16)
            return stored
        own = self.own[name]
        here = name + SUFFIX[HALF] if own == HALF and name in self.outputs else name
        if own == kind:
            return here
        if here != name:
            return name  # the output of the graph is that value in fp32
        self._cast(here, here + SUFFIX[kind], kind)
        return here + SUFFIX[kind]

    def _cast(self, source: str, result: str, kind: int) -> None:
        self.casts.setdefault(result, node("Cast", [source], [result], to=kind))
