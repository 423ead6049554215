"""The dense graph at other widths, with other weights and numerics: no second export."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from onnx import NodeProto, TensorProto, helper

from zipc.core.errors import ExportMismatch
from zipc.exporters.bfloat16 import bfloat16_
from zipc.exporters.finish import finish
from zipc.exporters.graph import OnnxGraph, attribute, node
from zipc.exporters.shapes import (
    SizeOf,
    Sizes,
    constant_,
    drop_empty_inputs_,
    resize_,
    write_target_,
)
from zipc.numerics.int4 import BLOCK

EMISSION = 5  # of the way graphs are written: prices of another are not prices of these
BLOCKED_OPSET = 21  # the first whose DequantizeLinear has blocks and INT4
S4 = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
FloatArray = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Int8Weights:
    """What an integer map needs. `values` (out, in) int8, `scale` (out,).

    Those of a convolution lie as in torch. `activation` is (scale, zero point) of a calibrated
    input, or None for a dynamic range. With `scale` (out, blocks) the values are INT4, and the
    input stays in floats.
    """

    values: np.ndarray[Any, np.dtype[np.int8]]
    scale: FloatArray
    activation: tuple[float, int] | None = None

    def dequantised(self) -> FloatArray:
        """The floats that the integers stand for."""
        each = self.scale.reshape(-1, *[1] * (self.values.ndim - 1))
        floats: FloatArray = (self.values * each).astype(np.float32)
        return floats


@dataclass(slots=True)
class Edit:
    """Changes to the dense graph, by torch names.

    `tensors`: new float values in torch layout; `removed`: module path of a linear map that loses
    its whole input -> what it outputs, (out,); `int8`: module path -> integer weights; `size_of`:
    the new size of an axis of a traced node's result; `picks`: traced slice of one index -> the
    index it takes from now on; `silent`: removed maps that leave the sums they stand in;
    `bf16`: linear maps that multiply in bf16, whose `tensors` hold such values.
    """

    tensors: Mapping[str, FloatArray] = field(default_factory=dict)
    removed: Mapping[str, FloatArray] = field(default_factory=dict)
    int8: Mapping[str, Int8Weights] = field(default_factory=dict)
    size_of: SizeOf | None = None
    picks: Mapping[str, int] = field(default_factory=dict)
    silent: Collection[str] = ()
    bf16: Collection[str] = ()


class Emitter(Protocol):
    """Writes what differs from runtime to runtime: integer maps, and the last passes."""

    def quantise_(
        self, graph: OnnxGraph, maps: Mapping[str, Int8Weights], *, part: bool
    ) -> None: ...

    def finish_(self, graph: OnnxGraph) -> None: ...


class OnnxRuntime:
    """The `Emitter` for ONNX Runtime on a CPU: U8 x S8 products that have integer kernels there."""

    def quantise_(self, graph: OnnxGraph, maps: Mapping[str, Int8Weights], *, part: bool) -> None:
        rounding = _Rounding(graph)
        for module, weights in maps.items():
            for call in graph.map_nodes(module + ".weight"):
                if weights.scale.ndim == 2:
                    _unpack_(graph, call, weights)
                else:
                    _quantise_(graph, call, weights, rounding)
        rounding.give_scales(part=part)

    def finish_(self, graph: OnnxGraph) -> None:
        finish(graph)


ONNX_RUNTIME = OnnxRuntime()


def specialise(
    dense: OnnxGraph, edit: Edit, *, part: bool = False, emitter: Emitter = ONNX_RUNTIME
) -> OnnxGraph:
    """A copy of `dense` with the edit applied. Pure: `dense` is unchanged.

    In a `part`, the graph of one site, what the whole graph computes once for all is an input.
    """
    graph = dense.copy()
    for module in (*edit.int8, *edit.bf16):
        graph.own_(f"{module}.weight")
    for name, value in edit.tensors.items():
        if name in graph.weights:
            graph.write_(name, value)
        elif name.endswith(".bias") and graph.map_nodes(name.removesuffix("bias") + "weight"):
            _add_bias_(graph, name, value)
        else:
            raise ExportMismatch(f"{name} cannot be changed: it is not in the exported graph")
    for module, weights in edit.int8.items():
        if weights.values.ndim > 2:  # the groups that are left follow from the weight's shape
            graph.arrays[graph.weights[f"{module}.weight"][0]] = weights.dequantised()
    if edit.size_of is not None:
        resize_(graph, edit.size_of)
    for name, index in edit.picks.items():
        _pick_(graph, name, index)
    for module, constant in edit.removed.items():
        _remove_(graph, module, constant, edit)
    drop_empty_inputs_(graph)
    bfloat16_(graph, edit.bf16)
    emitter.quantise_(graph, edit.int8, part=part)
    emitter.finish_(graph)
    return graph


def _add_bias_(graph: OnnxGraph, name: str, value: FloatArray) -> None:
    """Give a linear map without bias one."""
    graph.arrays[name] = value
    graph.weights[name] = (name, False)
    for call in graph.map_nodes(name.removesuffix("bias") + "weight"):
        if call.op_type != "MatMul":
            del call.input[2:]
            call.input.append(name)
            continue
        inner = call.output[0] + "_unbiased"
        graph.nodes.append(node("Add", [inner, name], [call.output[0]]))
        call.output[0] = inner


def _remove_(graph: OnnxGraph, module: str, constant: FloatArray, edit: Edit) -> None:
    """Replace a map (with its bias) by its constant output; what fed it becomes dead.

    A silent one leaves the sums it stands in: its constant is zero.
    """
    for number, call in enumerate(graph.map_nodes(module + ".weight")):
        name = f"{module}.constant{number or ''}"
        value = constant
        if call.op_type in ("Conv", "ConvTranspose"):
            value = constant.reshape(-1, *[1] * (graph.arrays[call.input[1]].ndim - 2))
        consumers = graph.consumers()
        last = call
        after = consumers.get(call.output[0], [])
        if call.op_type == "MatMul" and len(after) == 1 and _is_bias(graph, after[0], module):
            last = after[0]
        elif len(after) == 1 and after[0].op_type == "BatchNormalization":
            last = after[0]
            value = _normalised(graph, last, value)
        graph.arrays[name] = value
        output = last.output[0]
        users = consumers.get(output, [])
        if output not in graph.outputs() and all(_broadcasts(graph, u, output) for u in users):
            for user in users:
                if module in edit.silent:
                    _skip_(graph, user, output)
                else:
                    user.input[list(user.input).index(output)] = name
        else:
            graph.nodes = [n for n in graph.nodes if n is not last]
            _expand_(graph, name, output, like=call.input[0], size_of=edit.size_of)


def _pick_(graph: OnnxGraph, name: str, index: int) -> None:
    """Let a slice of one index take another one."""
    made = graph.results.get(name)
    cut = next((n for n in graph.nodes if made in n.output), None)
    if cut is None:
        return  # not in this part of the graph
    if cut.op_type != "Slice":
        raise ExportMismatch(f"{name} is no Slice in the exported graph, but {cut.op_type}")
    cut.input[1], cut.input[2] = constant_(graph, [index]), constant_(graph, [index + 1])


def _skip_(graph: OnnxGraph, total: NodeProto, term: str) -> None:
    """Write a sum of two without one of its terms."""
    rest = next(i for i in total.input if i != term)
    graph.nodes = [n for n in graph.nodes if n is not total]
    if total.output[0] in graph.outputs():
        graph.nodes.append(node("Identity", [rest], [total.output[0]]))
        return
    for user in graph.nodes:
        for place, name in enumerate(user.input):
            if name == total.output[0]:
                user.input[place] = rest


def _normalised(graph: OnnxGraph, norm: NodeProto, value: FloatArray) -> FloatArray:
    """What a BatchNormalization makes of a constant (channels, 1, ...)."""
    scale, shift, mean, var = (graph.arrays[i].astype(np.float64) for i in norm.input[1:5])
    factor = scale / np.sqrt(var + attribute(norm, "epsilon", 1e-5))
    flat = value.reshape(len(value), -1)[:, 0]
    made: FloatArray = ((flat - mean) * factor + shift).astype(np.float32)
    return made.reshape(value.shape)


def _broadcasts(graph: OnnxGraph, user: NodeProto, value: str) -> bool:
    """Whether a sum keeps its shape when `value` is constant: its other term has all of it."""
    others = [i for i in user.input if i != value]
    if user.op_type not in ("Add", "Sum") or len(user.input) != 2 or len(others) != 1:
        return False
    full = graph.shapes.get(user.output[0])
    return others[0] not in graph.arrays and graph.shapes.get(others[0], []) == full


def _expand_(
    graph: OnnxGraph, constant: str, output: str, *, like: str, size_of: SizeOf | None
) -> None:
    """Repeat a constant over the other dimensions of `output`.

    They are read off the inputs of the graph, or, where they cannot be, off `like` or what has them
    earlier.
    """
    axis = len(graph.shapes[output]) - 1 if graph.arrays[constant].ndim == 1 else 1
    sizes, traced = Sizes(graph), {v: n for n, v in reversed(graph.results.items())}.get(output)
    target = [sizes.of(size) for size in graph.shapes[output]]
    target[axis] = len(graph.arrays[constant])
    for place in range(len(target)):
        new = size_of(traced, place) if size_of is not None and traced is not None else None
        if isinstance(new, int) and place != axis:
            target[place] = new
    known = [t for t in target if t is not None]
    if len(known) == len(target):
        repeat = node("Expand", [constant, ""], [output])
        graph.nodes.append(repeat)
        write_target_(graph, repeat, known)
        return
    if axis != len(target) - 1:
        raise ExportMismatch(f"the shape of {output} is unknown in the exported graph")
    leading = graph.shapes[output][:-1]
    values = [
        *(i.name for i in graph.proto.graph.input),
        *(o for n in graph.nodes for o in n.output),
    ]
    same = (v for v in values if leading and graph.shapes.get(v, [])[: len(leading)] == leading)
    like = next(same, like)
    ends = output + "_from", output + "_to"
    graph.arrays[ends[0]] = np.array([0], dtype=np.int64)
    graph.arrays[ends[1]] = np.array([len(leading) or -1], dtype=np.int64)
    graph.arrays[output + "_width"] = np.array([graph.arrays[constant].shape[0]], dtype=np.int64)
    graph.nodes += [
        node("Shape", [like], [output + "_like"]),
        node("Slice", [output + "_like", *ends], [output + "_head"]),
        node("Concat", [output + "_head", output + "_width"], [output + "_shape"], axis=0),
        node("Expand", [constant, output + "_shape"], [output]),
    ]


def _is_bias(graph: OnnxGraph, candidate: NodeProto, module: str) -> bool:
    bias = graph.weights.get(module + ".bias")
    return candidate.op_type == "Add" and bias is not None and bias[0] in candidate.input


class _Rounding:
    """Inputs rounded to U8: maps with the same input and range share it."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.shared: dict[tuple[str, tuple[float, int] | None], tuple[str, str, str]] = {}
        self.fixed: dict[str, float] = {}  # value that must hold a calibrated scale -> that scale

    def of(self, source: str, activation: tuple[float, int] | None) -> tuple[str, str, str]:
        """(values, scale, zero point) of a value in U8; no activation asks for a dynamic range."""
        key = (source, activation)
        if key not in self.shared:
            self.shared[key] = self._emit(source, activation)
        return self.shared[key]

    def _emit(self, source: str, activation: tuple[float, int] | None) -> tuple[str, str, str]:
        graph = self.graph
        if activation is None:
            made = (f"{source}_q", f"{source}_q_scale", f"{source}_q_zero")
            graph.nodes.append(node("DynamicQuantizeLinear", [source], list(made)))
            return made
        scale, zero = activation
        at = f"{source}_by_{scale}_{zero}"
        graph.arrays[at + "_scale"] = np.array(scale, dtype=np.float32)
        graph.arrays[at + "_zero"] = np.array(zero, dtype=np.uint8)
        pair = [at + "_scale", at + "_zero"]
        graph.nodes.append(node("QuantizeLinear", [source, *pair], [at + "_q"]))
        self.fixed[at + "_given"] = scale
        return at + "_q", at + "_given", at + "_zero"

    def give_scales(self, *, part: bool) -> None:
        """Emit the calibrated scales as values that seem to depend on the input of the graph.

        ONNX Runtime makes one integer kernel with bias of a product whose scale it computes at run
        time. A constant would be folded into the scale of the weight, which that fusion does not
        know; of QuantizeLinear and DequantizeLinear it makes a kernel without bias, and the sums
        that are left cost MiniLM 2 % on one thread and 10 % on two.
        """
        graph = self.graph
        if not self.fixed:
            return
        if part:  # inputs with values of their own, which nobody has to feed
            graph.add_inputs_({name: [1] for name in self.fixed})
            graph.arrays |= {n: np.array([s], dtype=np.float32) for n, s in self.fixed.items()}
            return
        given = next(i.name for i in graph.proto.graph.input if graph.shapes[i.name])
        axes = len(graph.shapes[given])
        first, scales = "int8_first_input", "int8_scales"
        graph.arrays["int8_zero"] = np.zeros(1, dtype=np.float32)
        graph.arrays[scales] = np.array(list(self.fixed.values()), dtype=np.float32)
        graph.nodes += [
            node(
                "Slice",
                [given, constant_(graph, [0] * axes), constant_(graph, [1] * axes)],
                [first],
            ),
            node("Reshape", [first, constant_(graph, [1])], [first + "_alone"]),
            node("Cast", [first + "_alone"], [first + "_is"], to=int(TensorProto.BOOL)),
            node("Cast", [first + "_is"], [first + "_counts"], to=int(TensorProto.FLOAT)),
            node("Mul", [first + "_counts", "int8_zero"], [first + "_nothing"]),
            node("Add", [first + "_nothing", scales], [scales + "_given"]),
            node(
                "Split", [scales + "_given"], list(self.fixed), axis=0, num_outputs=len(self.fixed)
            ),
        ]


def _quantise_(
    graph: OnnxGraph, call: NodeProto, weights: Int8Weights, rounding: _Rounding
) -> None:
    """Emit integer arithmetic for one linear map."""
    source, stem = call.input[0], graph_name(call)
    graph.arrays[stem + "_values"] = weights.values.T
    graph.arrays[stem + "_scale"] = weights.scale.astype(np.float32)
    graph.arrays[stem + "_zero"] = np.zeros(len(weights.scale), dtype=np.int8)
    out = graph.take_product_(call)
    q, scale, zero = rounding.of(source, weights.activation)
    graph.nodes += [
        node("MatMulInteger", [q, stem + "_values", zero, stem + "_zero"], [stem + "_int32"]),
        node("Cast", [stem + "_int32"], [stem + "_float"], to=int(TensorProto.FLOAT)),
        node("Mul", [scale, stem + "_scale"], [stem + "_rescale"]),
        node("Mul", [stem + "_float", stem + "_rescale"], [out]),
    ]


def _unpack_(graph: OnnxGraph, call: NodeProto, weights: Int8Weights) -> None:
    """Let one linear map read INT4 weights in blocks: ONNX Runtime makes one kernel of it."""
    graph.raise_opset_(BLOCKED_OPSET)
    stem = graph_name(call)
    graph.arrays[stem + "_values"] = weights.values.T.astype(S4)
    graph.arrays[stem + "_scale"] = weights.scale.T
    pair, floats = [stem + "_values", stem + "_scale"], stem + "_floats"
    out = graph.take_product_(call)
    if _fused_otherwise(graph, call.input[0], out):
        graph.nodes.append(node("Sum", [out + "_alone"], [out]))
        out += "_alone"
    graph.nodes += [
        node("DequantizeLinear", pair, [floats], axis=0, block_size=BLOCK),
        node("MatMul", [call.input[0], floats], [out]),
    ]


def _fused_otherwise(graph: OnnxGraph, source: str, out: str) -> bool:
    """Whether ONNX Runtime makes one kernel of a product and what follows, which reads floats.

    So it does with Relu or Clip and, where there are two axes, with a bias. A sum of one term keeps
    them apart.
    """
    flat = len(graph.shapes.get(source, [])) < 3
    for after in graph.nodes:
        if out in after.input:
            biased = after.op_type == "Add" and any(i in graph.arrays for i in after.input)
            if after.op_type in ("Relu", "Clip") or (flat and biased):
                return True
    return False


def graph_name(call: NodeProto) -> str:
    """A stem for the values of one linear call."""
    return f"{call.input[1]}/{call.output[0]}"


INTEGER_KERNELS = (
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "QGemm",
    "QLinearMatMul",
    "QLinearConv",
    "ConvInteger",
    "MatMulNBits",  # of INT4 weights and an input that it rounds to S8 in blocks
)


def count_integer_kernels(nodes: Sequence[NodeProto]) -> int:
    """Integer products in an optimised ONNX Runtime graph."""
    return sum(n.op_type in INTEGER_KERNELS for n in nodes)
