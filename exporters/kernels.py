"""An ONNX graph at concrete sizes as the fused kernels TensorRT runs: what the roofline prices.

The rules are those TensorRT documents (developer guide, "Types of fusions"): what follows a product
point by point belongs to it, and so does a residual sum after a convolution; products of one input
are one product; softmax(q k') v is one kernel; other point-wise operations, sums over axes and
normalisations that follow each other are one pass. Changes of shape, Concat and rounding to INT8
cost nothing. Floats are kept in fp16, whatever the graph says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from zipc.core.axes import size_of
from zipc.core.errors import UnsupportedModel
from zipc.core.types import Pattern, Workload
from zipc.exporters.graph import Array, OnnxGraph, attribute
from zipc.latency_tables.operators import (
    BYTES,
    Attention,
    Operator,
    Pass,
    Precision,
    Product,
    convolution,
    linear,
)

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
FREE = frozenset(
    "Cast Concat DequantizeLinear Dropout DynamicQuantizeLinear Flatten Identity QuantizeLinear "
    "Reshape Shape Slice Split Squeeze Unsqueeze".split()
)
POINTWISE = frozenset(
    "Abs Add And Cos Clip Div Elu Equal Erf Exp Gelu Greater HardSigmoid HardSwish LeakyRelu Less "
    "Log Max Min Mish Mul Neg Not Or PRelu Pow Reciprocal Relu Round Sigmoid Sign Sin Softplus "
    "Sqrt Sub Sum Tanh Where".split()
)
OVER_AXES = frozenset(
    "BatchNormalization GroupNormalization InstanceNormalization LayerNormalization LogSoftmax "
    "RMSNormalization ReduceMax ReduceMean ReduceMin ReduceSum RotaryEmbedding "
    "SimplifiedLayerNormalization Softmax".split()
)
PRODUCTS = frozenset("Conv ConvInteger ConvTranspose Gemm MatMul MatMulInteger".split())
KEPT: Precision = "fp16"  # what activations are kept in
LARGE = 256  # elements of a constant that shape inference never has to read


def kernels_of(model: bytes, workload: Workload) -> list[Operator]:
    """The kernels of a graph whose named axes have the sizes of a workload.

    Raises:
        UnsupportedModel: the shape of some value does not follow from the sizes of the inputs.
    """
    proto = onnx.load_from_string(model)
    graph = OnnxGraph.of(proto)
    graph.shapes = concrete_shapes(graph, workload)
    return _Reading(graph).kernels()


def concrete_shapes(graph: OnnxGraph, workload: Workload) -> dict[str, list[int | str]]:
    """The shape of every value, all in numbers where they follow from the workload.

    Sizes that the graph computes are folded into constants until nothing new is known.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for value in proto.graph.input:
        given = workload.input_shapes.get(value.name)
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_param"):
                dim.dim_value = given[axis] if given else _size(dim.dim_param, workload.axes)
    for value in proto.graph.output:  # inferred anew
        value.type.tensor_type.ClearField("shape")
    arrays = {name: held for name, held in graph.arrays.items() if held.size <= LARGE}
    for name, held in graph.arrays.items():
        if held.size > LARGE:
            kind = helper.np_dtype_to_tensor_dtype(held.dtype)
            proto.graph.input.append(helper.make_tensor_value_info(name, kind, held.shape))
    nodes = graph.ordered()
    while True:
        del proto.graph.node[:], proto.graph.initializer[:]
        proto.graph.node.extend(nodes)
        proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
        inferred = OnnxGraph.of(shape_inference.infer_shapes(proto, data_prop=True))
        left = [n for n in nodes if not _fold_(n, arrays, inferred)]
        if len(left) == len(nodes):
            break
        nodes = left
    graph.types |= inferred.types
    return inferred.shapes | {name: list(held.shape) for name, held in arrays.items()}


def _fold_(node: NodeProto, arrays: dict[str, Array], graph: OnnxGraph) -> bool:
    """Compute a small node of whole numbers whose inputs are known; whether it was one."""
    if node.op_type == "Shape":
        shape = graph.shapes.get(node.input[0])
        if shape is None or not all(isinstance(size, int) and size for size in shape):
            return False
        part = shape[slice(attribute(node, "start", 0), attribute(node, "end", len(shape)))]
        arrays[node.output[0]] = np.array(part, dtype=np.int64)
        return True
    inputs = [i for i in node.input if i]
    if not inputs or any(i not in arrays for i in inputs):
        return False
    if any(arrays[i].dtype.kind not in "ib" for i in inputs):
        return False
    feeds = {i: arrays[i] for i in inputs}
    try:
        values = ReferenceEvaluator(node).run(None, feeds)
    except Exception:  # of an operator that onnx's own evaluator has in part: its value stays open
        return False
    arrays.update(zip(node.output, map(np.asarray, values), strict=True))
    return True


def _size(name: str, axes: Mapping[str, int]) -> int:
    size = size_of(name, axes)
    if size is None:
        raise UnsupportedModel(
            f"The axis '{name}' of the graph has no size in the workload. Give --input-shapes."
        )
    return size


@dataclass(slots=True)
class _Group:
    """Nodes that run as one kernel, and the values it has to read besides its first node's."""

    node: NodeProto
    kind: str  # "product", "attention", "pass"
    nodes: list[NodeProto] = field(default_factory=list)
    added: bool = False


class _Reading:
    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.consumers = graph.consumers()
        self.outputs = set(graph.outputs())
        self.constant = set(graph.arrays)
        self.groups: list[_Group] = []
        self.group_of: dict[str, _Group] = {}

    def kernels(self) -> list[Operator]:
        ordered = self.graph.ordered()
        place = {id(n): i for i, n in enumerate(ordered)}
        self.place = {o: place[id(n)] for n in ordered for o in n.output}
        inside = self._attentions(ordered)
        for node in ordered:
            if all(i in self.constant or not i for i in node.input) and node.input:
                self.constant.update(node.output)
            elif id(node) in inside:
                self._enter(node, inside[id(node)])
            elif node.op_type in PRODUCTS:
                self._begin(node, "product")
            elif node.op_type == "Attention":
                self._begin(node, "attention")
            elif all(self._is_vector(o) for o in node.output):
                continue  # scales and sizes
            elif node.op_type in FREE or not self._is_float(node):
                self._pass_through(node)
            elif node.op_type in POINTWISE or node.op_type in OVER_AXES:
                self._light(node)
            else:
                self._begin(node, "pass")
        return list(_merged([(self._key(g), self._operator(g)) for g in self.groups]))

    def _is_float(self, node: NodeProto) -> bool:
        return any(self.graph.types.get(o) in FLOATS for o in node.output)

    def _begin(self, node: NodeProto, kind: str) -> None:
        group = _Group(node, kind, [node])
        self.groups.append(group)
        self.group_of.update(dict.fromkeys(node.output, group))

    def _enter(self, node: NodeProto, group: _Group) -> None:
        group.nodes.append(node)
        if group not in self.groups:
            self.groups.append(group)
        self.group_of.update(dict.fromkeys(node.output, group))

    def _pass_through(self, node: NodeProto) -> None:
        """What costs nothing belongs to the kernel before it."""
        group = self._latest(node)
        if group is not None:
            group.nodes.append(node)
            self.group_of.update(dict.fromkeys(node.output, group))

    def _latest(self, node: NodeProto) -> _Group | None:
        made = [i for i in node.input if i in self.group_of]
        return self.group_of[max(made, key=lambda i: self.place[i])] if made else None

    def _light(self, node: NodeProto) -> None:
        group = self._latest(node)
        others = [i for i in self._activations(node) if self.group_of.get(i) is not group]
        if group is None or group.kind == "attention":
            self._begin(node, "pass")
        elif group.kind == "pass":
            self._enter(node, group)
        elif node.op_type in OVER_AXES and node.op_type != "BatchNormalization":
            self._begin(node, "pass")
        elif not others and not self._is_gate(node):
            self._enter(node, group)
        elif node.op_type in ("Add", "Sum") and "Conv" in group.node.op_type and not group.added:
            group.added = True
            self._enter(node, group)
        else:
            self._begin(node, "pass")

    def _is_gate(self, node: NodeProto) -> bool:
        """Whether it multiplies what comes in with something made of it: x sigmoid(x)."""
        return node.op_type == "Mul" and len(self._activations(node)) > 1

    def _activations(self, node: NodeProto) -> list[str]:
        found = (i for i in dict.fromkeys(node.input) if i and i not in self.constant)
        return [i for i in found if not self._is_vector(i)]

    def _is_vector(self, name: str) -> bool:
        """Whether a value is a number or a vector: those scale and shift, and cost nothing."""
        return len(self.graph.shapes.get(name, [0, 0])) < 2

    def _attentions(self, ordered: list[NodeProto]) -> dict[int, _Group]:
        """The nodes of softmax(q k') v by the kernel they are in."""
        inside: dict[int, _Group] = {}
        for softmax in ordered:
            after = self.consumers.get(softmax.output[0], [])
            if softmax.op_type != "Softmax" or len(after) != 1 or after[0].op_type != "MatMul":
                continue
            if after[0].input[0] != softmax.output[0] or after[0].input[1] in self.graph.arrays:
                continue
            way, at = [softmax], softmax.input[0]
            while (maker := self.producers.get(at)) is not None and maker.op_type in POINTWISE:
                way.append(maker)
                at = max(maker.input, key=lambda i: self.place.get(i, -1))
            if maker is None or maker.op_type != "MatMul":
                continue
            group = _Group(after[0], "attention")
            inside |= {id(n): group for n in (*way, maker, after[0])}
        return inside

    def _key(self, group: _Group) -> tuple[str, str]:
        """Products with one key, of one input by constants, are one product."""
        source = self._source(group.node.input[0]) if group.kind == "product" else ""
        return source, group.node.output[0]

    def _source(self, name: str) -> str:
        """The value before rounding to INT8, whose copies are one."""
        maker = self.producers.get(name)
        rounding = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast")
        return self._source(maker.input[0]) if maker and maker.op_type in rounding else name

    def _operator(self, group: _Group) -> Operator:
        if group.kind == "attention":
            return self._attention(group)
        if group.kind == "pass":
            moved = sum(self._values(name) for name in self._ends(group)) * BYTES[KEPT]
            return Pass(moved, fused=self._goes_on(group))
        return self._product(group)

    def _goes_on(self, group: _Group) -> bool:
        """Whether a pass reads nothing but floats that come in.

        In the graph of a site whose units are all gone that is the normalisation after it, which in
        the whole network goes on from the pass before.
        """
        made = {o for n in group.nodes for o in n.output}
        read = {i for n in group.nodes for i in n.input if i and i not in self.constant} - made
        given = {i.name for i in self.graph.proto.graph.input}
        return read <= given and all(self.graph.types.get(name) in FLOATS for name in read)

    def _ends(self, group: _Group) -> Iterable[str]:
        """Values that come into a group, and those of it that are used elsewhere."""
        made = {o for n in group.nodes for o in n.output}
        read = {i for n in group.nodes for i in n.input if i and i not in self.constant}
        inside = {id(n) for n in group.nodes}
        yield from sorted(read - made)
        for name in sorted(made):
            users = self.consumers.get(name, [])
            if name in self.outputs or any(id(u) not in inside for u in users):
                yield name

    def _product(self, group: _Group) -> Operator:
        node = group.node
        weight, rounded = self._weight(node.input[1])
        integer = node.op_type in ("MatMulInteger", "ConvInteger") or (
            rounded and self._rounded(node.input[0])
        )
        precision: Precision = "int8" if integer else KEPT
        out = self._shape(node.output[0])
        if "Conv" in node.op_type:
            return self._convolution(group, out, weight, precision)
        shape = self._shape(node.input[0])
        channels = shape[0 if attribute(node, "transA", 0) else -1]
        if weight is None:
            return self._of_activations(shape, out)
        pattern = _pattern(weight.T if attribute(node, "transB", 0) == 0 else weight)
        rows = math.prod(out[:-1])
        return linear(rows, out[-1], channels, precision=precision, pattern=pattern, written=KEPT)

    def _of_activations(self, left: list[int], out: list[int]) -> Product:
        batch, rows, columns = math.prod(out[:-2]), out[-2], out[-1]
        moved = batch * (rows * left[-1] + rows * columns) * BYTES[KEPT]
        return Product(rows, columns, left[-1], moved, batch=batch, precision=KEPT)

    def _convolution(
        self, group: _Group, out: list[int], weight: np.ndarray | None, precision: Precision
    ) -> Operator:
        node = group.node
        source, groups = self._shape(node.input[0]), attribute(node, "group", 1)
        size = self._shape(node.input[1])[2:]
        image, before = out[2:], source[2:]
        if node.op_type == "ConvTranspose":
            image, before = before, image
        height, width = image[0], math.prod(image[1:])
        return convolution(
            (out[0], height, width),
            out[1],
            source[1],
            kernel=(size[0], math.prod(size[1:])),
            stride=(max(1, before[0] // height), max(1, math.prod(before[1:]) // width)),
            groups=groups,
            precision=precision,
            pattern="dense" if weight is None else _pattern(weight),
            written=KEPT,
            added=group.added,
        )

    def _attention(self, group: _Group) -> Operator:
        node = group.node
        if node.op_type == "MatMul":  # of the probabilities and the values
            probabilities, out = self._shape(node.input[0]), self._shape(node.output[0])
            heads = math.prod(probabilities[:-2])
            return Attention(heads, probabilities[-2], probabilities[-1], out[-1])
        query, key = self._shape(node.input[0]), self._shape(node.input[1])
        past = self._shape(node.input[4])[2] if len(node.input) > 4 and node.input[4] else 0
        if len(query) == 4:
            batch, heads, queries, size = query
            keys = key[2]
        else:
            batch, queries, width = query
            heads = attribute(node, "q_num_heads", 1)
            size, keys = width // heads, key[1]
        return Attention(batch * heads, queries, keys + past, size)

    def _weight(self, name: str) -> tuple[np.ndarray | None, bool]:
        """The constant behind a value, and whether it is in INT8."""
        rounded = False
        while name not in self.graph.arrays:
            maker = self.producers.get(name)
            if maker is None or maker.op_type not in ("DequantizeLinear", "QuantizeLinear", "Cast"):
                return None, False
            rounded = rounded or maker.op_type == "DequantizeLinear"
            name = maker.input[0]
        return self.graph.arrays[name], rounded

    def _rounded(self, name: str) -> bool:
        maker = self.producers.get(name)
        if maker is not None and maker.op_type in ("Cast", "Reshape"):
            return self._rounded(maker.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"

    def _values(self, name: str) -> int:
        return math.prod(self._shape(name))

    def _shape(self, name: str) -> list[int]:
        held = self.graph.arrays.get(name)
        if held is not None:
            return list(held.shape)
        shape = self.graph.shapes.get(name)
        if shape is None or not all(isinstance(size, int) for size in shape):
            raise UnsupportedModel(
                f"The shape of {name} does not follow from the sizes of the inputs, so the graph "
                "cannot be priced by a model. Measure on the device: zipc profile --host."
            )
        return [int(size) for size in shape]


def _merged(found: Iterable[tuple[tuple[str, str], Operator]]) -> Iterable[Operator]:
    """Join linear maps of one input, as long as they run alike."""
    joined: dict[object, Operator] = {}
    for (source, name), operator in found:
        if not isinstance(operator, Product) or operator.positions > 1 or operator.batch > 1:
            joined[name] = operator
            continue
        key = source, operator.rows, operator.channels, operator.precision, operator.pattern
        held = joined.get(key)
        if not isinstance(held, Product):
            joined[key] = operator
            continue
        again = operator.rows * operator.channels * BYTES[operator.precision]  # read once
        joined[key] = replace(
            held,
            columns=held.columns + operator.columns,
            moved_bytes=held.moved_bytes + operator.moved_bytes - again,
        )
    return joined.values()


def _pattern(weight: np.ndarray) -> Pattern:
    """2:4 where of every four channels in a row, at each position, two are zero. (out, in, ...)"""
    channels = weight.shape[1]
    if channels % 4:
        return "dense"
    fours = weight.reshape(weight.shape[0], channels // 4, 4, -1)
    return "2:4" if bool((np.count_nonzero(fours, axis=2) <= 2).all()) else "dense"
