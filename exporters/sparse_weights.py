"""Which weights of an ONNX file have the 2:4 pattern, and which could have it.

A weight is looked for behind whatever leaves zeros where they are: QuantizeLinear and
DequantizeLinear, Transpose, Cast, Identity. One tensor is in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from zipc.exporters.graph import attribute
from zipc.numerics.pattern import conforms, obstacle

WEIGHT_AND_ZERO = {  # operator -> places of its weight and of the zero point of that
    "Conv": (1, None),
    "Gemm": (1, None),
    "MatMul": (1, None),
    "ConvInteger": (1, 3),
    "MatMulInteger": (1, 3),
    "QLinearConv": (3, 5),
    "QLinearMatMul": (3, 5),
}
PASSES = ("Cast", "Identity", "Transpose", "QuantizeLinear", "DequantizeLinear")
INTEGERS = (TensorProto.INT8, TensorProto.UINT8)


@dataclass(frozen=True, slots=True)
class SparseWeight:
    """A constant weight of a product; `obstacle` says why no sparse kernel would take it."""

    name: str
    obstacle: str | None
    conforms: bool


@dataclass(slots=True)
class _Path:
    """From a product back to the constant it reads."""

    axes: tuple[int, int]  # of input and output channels
    name: str = ""
    rounded: bool = False
    zeros: list[str] = field(default_factory=list)  # names of zero points

    def follow(self, node: NodeProto) -> None:
        """Take one step back."""
        self.name = node.input[0]
        if node.op_type == "Transpose":
            turned: list[int] | None = attribute(node, "perm", None)
            a, b = self.axes
            # without one, axes are reversed: their numbers from the other end
            self.axes = (-1 - a, -1 - b) if turned is None else (turned[a], turned[b])
        elif node.op_type.endswith("Linear"):
            self.rounded = True
            self.zeros += node.input[2:3]


def sparse_weights(model: onnx.ModelProto, *, folder: Path) -> list[SparseWeight]:
    """Every constant weight of a product in the main graph, once; external data from `folder`."""
    constants = {t.name: t for t in model.graph.initializer}
    makers: dict[str, NodeProto] = {}
    for node in model.graph.node:
        makers |= dict.fromkeys(node.output, node)
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t

    def zero(name: str) -> bool:
        held = constants.get(name)
        return held is None or not numpy_helper.to_array(held, str(folder)).any()

    found: dict[tuple[str, int], SparseWeight] = {}
    for node in model.graph.node:
        if node.op_type not in WEIGHT_AND_ZERO or node.domain not in ("", "ai.onnx"):
            continue
        path = _start(node)
        while path.name not in constants and path.name in makers:
            maker = makers[path.name]
            if maker.op_type not in PASSES:
                break
            path.follow(maker)
        if path.name not in constants:
            continue
        tensor = constants[path.name]
        channels, outputs = (axis % max(len(tensor.dims), 1) for axis in path.axes)
        if len(tensor.dims) < 2 or (path.name, channels) in found:
            continue
        integer = path.rounded or tensor.data_type in INTEGERS
        reason = obstacle(tensor.dims[outputs], tensor.dims[channels], integer=integer)
        if not all(map(zero, path.zeros)):
            reason = "its zero point is not 0"
        values = numpy_helper.to_array(tensor, str(folder))
        found[path.name, channels] = SparseWeight(
            path.name, reason, conforms(values, axis=channels)
        )
    return list(found.values())


def _start(node: NodeProto) -> _Path:
    place, zero = WEIGHT_AND_ZERO[node.op_type]
    axes = (-2, -1)
    if "Conv" in node.op_type:
        axes = (1, 0)
    elif node.op_type == "Gemm" and attribute(node, "transB", 0):
        axes = (-1, -2)
    zeros = [] if zero is None else list(node.input[zero : zero + 1])
    return _Path(axes, node.input[place], zeros=zeros)
