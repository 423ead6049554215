"""An ONNX graph one can edit: nodes in a list, initialisers as arrays, parameters by torch name."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

T = TypeVar("T")
MAPS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
LINEAR = ("MatMul", "MatMulInteger", "Gemm")
REDEFINED = frozenset({"GroupNormalization"})  # means another thing after opset 20
Array = npt.NDArray[np.generic]


@dataclass(slots=True)
class OnnxGraph:
    """Nodes, initialisers and what the exporter knew about them.

    `weights` maps a torch parameter to (initialiser, whether it is stored transposed);
    `shapes` gives the symbolic shape of every value of the dense graph. `origin` maps a value to
    the traced node it was made from, `results` a traced node to the value that holds its result.
    """

    proto: onnx.ModelProto  # header, inputs and outputs; its nodes and initialisers are ignored
    nodes: list[NodeProto]
    arrays: dict[str, Array]
    weights: dict[str, tuple[str, bool]] = field(default_factory=dict)
    shapes: dict[str, list[int | str]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, proto: onnx.ModelProto) -> OnnxGraph:
        graph = proto.graph
        arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        shapes: dict[str, list[int | str]] = {}
        types: dict[str, int] = {}
        for value in (*graph.value_info, *graph.input, *graph.output):
            tensor = value.type.tensor_type
            types[value.name] = tensor.elem_type
            shapes[value.name] = [d.dim_param or d.dim_value for d in tensor.shape.dim]
        header = onnx.ModelProto()
        header.CopyFrom(proto)
        del header.graph.node[:], header.graph.initializer[:], header.graph.value_info[:]
        return cls(header, list(graph.node), arrays, {}, shapes, types)

    def copy(self) -> OnnxGraph:
        """A copy whose nodes can be edited; arrays are shared and must be replaced, not changed."""
        return OnnxGraph(
            self.proto,
            [copy.deepcopy(n) for n in self.nodes],
            dict(self.arrays),
            dict(self.weights),
            self.shapes,
            self.types,
            self.origin,
            self.results,
        )

    def producers(self) -> dict[str, NodeProto]:
        return {o: n for n in self.nodes for o in n.output}

    def consumers(self) -> dict[str, list[NodeProto]]:
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                found.setdefault(name, []).append(node)
        return found

    def outputs(self) -> list[str]:
        return [o.name for o in self.proto.graph.output]

    def map_nodes(self, parameter: str) -> list[NodeProto]:
        """The products and convolutions that use a torch weight, or its transpose."""
        held = self.weights.get(parameter)
        if held is None:
            return []
        names = {held[0], *self._transposed(parameter)}
        return [n for n in self.nodes if n.op_type in MAPS and not names.isdisjoint(n.input[1:2])]

    def _transposed(self, parameter: str) -> set[str]:
        """Values that are a weight transposed, as maps read that of an embedding."""
        stored = self.weights.get(parameter, ("", False))[0]
        return {n.output[0] for n in self.nodes if transposes(n) and n.input[0] == stored}

    def write_(self, parameter: str, value: Array) -> None:
        """Change a torch weight, or the copy of it that its maps read."""
        stored, _ = self.weights[parameter]
        if self._transposed(parameter) and not np.array_equal(value, self.arrays[stored]):
            self.own_(parameter)
        stored, turned = self.weights[parameter]
        self.arrays[stored] = value.T if turned else value

    def own_(self, parameter: str) -> None:
        """Give maps that read the transpose of a weight, since an embedding reads it as it is, a
        matrix of their own."""
        if names := self._transposed(parameter):
            stored, own = self.weights[parameter][0], f"{parameter}.T"
            for call in self.map_nodes(parameter):
                call.input[1] = own
            self.arrays[own] = self.arrays[stored].T
            self.weights[parameter] = own, True
            used = {i for n in self.nodes for i in n.input}.union(self.outputs())
            dead = names - used
            self.nodes = [n for n in self.nodes if dead.isdisjoint(n.output)]

    def linear_width(self, at: NodeProto) -> int | None:
        """How many values a product with a matrix among the initialisers gives per row.

        The matrix may be unpacked from integers.
        """
        if at.op_type not in LINEAR:
            return None
        name = at.input[1]
        if name not in self.arrays:
            unpacked = [n for n in self.nodes if n.op_type == "DequantizeLinear"]
            name = next((n.input[0] for n in unpacked if name in n.output), name)
        weight = self.arrays.get(name)
        if weight is None or weight.ndim != 2:
            return None
        return int(weight.shape[0 if attribute(at, "transB", 0) else 1])

    def take_product_(self, call: NodeProto) -> str:
        """Remove a MatMul or Gemm, but not the bias it adds; returns the name for its product."""
        self.nodes.remove(call)
        out: str = call.output[0]
        if call.op_type != "Gemm" or len(call.input) < 3:
            return out
        self.nodes.append(node("Add", [out + "_product", call.input[2]], [out]))
        return out + "_product"

    def can_raise_opset(self, version: int) -> bool:
        """Whether all operators mean the same in the standard opset of that version."""
        held = [e.version for e in self.proto.opset_import if e.domain in ("", "ai.onnx")]
        return all(v >= version for v in held) or not any(
            n.op_type in REDEFINED for n in self.nodes
        )

    def raise_opset_(self, version: int) -> None:
        """Declare at least this version of the standard opset."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for entry in proto.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = max(entry.version, version)
        lowest = helper.find_min_ir_version_for(list(proto.opset_import))
        proto.ir_version = max(proto.ir_version, lowest)
        self.proto = proto

    def set_opset_(self, version: int) -> None:
        """Declare this version of the standard opset, where a newer one is not needed any more."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for entry in proto.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = version
        proto.ir_version = helper.find_min_ir_version_for(list(proto.opset_import))
        self.proto = proto

    def add_inputs_(self, shapes: Mapping[str, list[int]]) -> None:
        """Let the graph be given more values, in floats."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        proto.graph.input.extend(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        )
        self.proto = proto

    def row_bytes(self) -> int:
        """Bytes of all floats that one row of a batch makes; other open axes count as one."""
        return 4 * sum(
            math.prod(size for size in shape if isinstance(size, int))
            for name, shape in self.shapes.items()
            if self.types.get(name) == onnx.TensorProto.FLOAT and name not in self.arrays
        )

    def op_counts(self) -> Counter[str]:
        return Counter(n.op_type for n in self.nodes)

    def to_proto(self) -> onnx.ModelProto:
        """Drop what nothing uses, order the nodes and return a checked standard model."""
        nodes = _ordered(live(self.nodes, self.outputs()), self._given())
        used = {i for n in nodes for i in n.input} | set(self.outputs())
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(a, order="C"), n)  # a scalar stays a scalar
            for n, a in self.arrays.items()
            if n in used
        )
        return model

    def to_bytes(self) -> bytes:
        return bytes(self.to_proto().SerializeToString())

    def ordered(self) -> list[NodeProto]:
        """The nodes, each after those that make what it reads."""
        return _ordered(self.nodes, self._given())

    def _given(self) -> set[str]:
        return {"", *self.arrays, *(i.name for i in self.proto.graph.input)}


def live(nodes: list[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """The nodes that some output needs, in the order they came."""
    producer = {o: i for i, n in enumerate(nodes) for o in n.output}
    keep: set[int] = set()
    stack = list(outputs)
    while stack:
        index = producer.get(stack.pop())
        if index is not None and index not in keep:
            keep.add(index)
            stack += nodes[index].input
    return [n for i, n in enumerate(nodes) if i in keep]


def _ordered(nodes: list[NodeProto], given: set[str]) -> list[NodeProto]:
    """Topological order, stable."""
    made = {o: i for i, n in enumerate(nodes) for o in n.output}
    order: list[NodeProto] = []
    state = [0] * len(nodes)
    for root in range(len(nodes)):
        stack = [(root, False)]
        while stack:
            at, done = stack.pop()
            if done:
                order.append(nodes[at])
                state[at] = 2
            elif state[at] == 0:
                state[at] = 1
                stack.append((at, True))
                stack += [
                    (made[i], False)
                    for i in reversed(nodes[at].input)
                    if i not in given and state[made[i]] == 0
                ]
    return order


def transposes(at: NodeProto) -> bool:
    """Whether a node swaps the axes of a matrix."""
    return at.op_type == "Transpose" and attribute(at, "perm", [1, 0]) == [1, 0]


def attribute(owner: NodeProto, name: str, default: T) -> T:
    """The value of an attribute, or `default` where the node has none of that name."""
    for held in owner.attribute:
        if held.name == name:
            value: T = helper.get_attribute_value(held)
            return value
    return default


def node(
    op: str, inputs: list[str], outputs: list[str], **attributes: int | float | str | list[int]
) -> NodeProto:
    """A node of the standard domain, named after its first output."""
    made = helper.make_node(op, inputs, outputs, name=f"{op}/{outputs[0]}")
    made.attribute.extend(helper.make_attribute(k, v) for k, v in sorted(attributes.items()))
    return made
