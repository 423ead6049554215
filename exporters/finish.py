"""Last step before a graph is written: what can only be said once all widths are known."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper

from zipc.exporters.graph import OnnxGraph, attribute, node

ATTENTION_OPSET = 23  # the first with Attention as one operator
REDEFINED = frozenset({"GroupNormalization"})  # other meaning between the export's opset and it


def finish(graph: OnnxGraph) -> None:
    """Run the passes that need final widths. Outputs stay as they were, to rounding."""
    fuse_attention_(graph)


@dataclass(frozen=True, slots=True)
class _Heads:
    """A (batch, sequence, heads x size) value and the nodes that split it into heads."""

    source: str
    heads: int
    size: int
    scale: float
    nodes: tuple[NodeProto, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    inputs: list[str]
    output: str
    heads: int
    scale: float
    nodes: tuple[NodeProto, ...]  # the last first


def fuse_attention_(graph: OnnxGraph) -> None:
    """Write softmax(q k' scale + mask) v with its head splits and merge as one `Attention`.

    ONNX Runtime's CPU kernel reads and writes (batch, sequence, heads x size) without the four
    transposes and adds the mask while multiplying. Attention of another shape (a second bias on
    the scores, say) stays as it is.
    """
    if any(n.op_type in REDEFINED for n in graph.nodes):
        return
    match = _Match(graph)
    blocks = [b for n in graph.nodes if n.op_type == "Softmax" for b in [match.block(n)] if b]
    if not blocks:
        return
    _raise_opset_(graph)
    uses = Counter(i for n in graph.nodes for i in n.input)
    uses.update(graph.outputs())
    dead: set[int] = set()
    for block in blocks:
        uses[block.output] = 0
        for old in block.nodes:
            if not any(uses[o] for o in old.output):
                dead.add(id(old))
                uses.subtract(old.input)
    graph.nodes = [n for n in graph.nodes if id(n) not in dead] + [
        node(
            "Attention",
            b.inputs,
            [b.output],
            q_num_heads=b.heads,
            kv_num_heads=b.heads,
            scale=b.scale,
        )
        for b in blocks
    ]


class _Match:
    """Recognises attention around a Softmax; every method returns None where it is not there."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.consumers = graph.consumers()

    def block(self, softmax: NodeProto) -> _Block | None:
        if attribute(softmax, "axis", -1) not in (-1, 3):
            return None
        head, mask = self._scores(softmax.input[0])
        after = self._only(softmax, "MatMul")
        merge = self._only(after, "Transpose")
        flat = self._only(merge, "Reshape")
        if head is None or mask is None or not after or not merge or not flat:
            return None
        if after.input[0] != softmax.output[0] or attribute(merge, "perm", []) != [0, 2, 1, 3]:
            return None
        if self._constant(flat.input[1]) != [0, 0, -1]:
            return None
        product, scale, nodes = head
        query = self._split(product.input[0], [0, 2, 1, 3])
        key = self._split(product.input[1], [0, 2, 3, 1])
        value = self._split(after.input[1], [0, 2, 1, 3])
        if not query or not key or not value or query.size != key.size or value.scale != 1.0:
            return None
        if not query.heads == key.heads == value.heads:
            return None
        return _Block(
            [query.source, key.source, value.source, *mask],
            flat.output[0],
            query.heads,
            scale * query.scale * key.scale,
            (flat, merge, after, softmax, *nodes, product, *query.nodes, *key.nodes, *value.nodes),
        )

    def _scores(
        self, name: str
    ) -> tuple[tuple[NodeProto, float, list[NodeProto]] | None, list[str] | None]:
        """(q k' product, factor on it, nodes after it) and the mask as a list of none or one."""
        last = self.producers.get(name)
        if last is None:
            return None, None
        if last.op_type != "Add":
            return self._product(name), []
        for value, mask in (last.input, reversed(last.input)):
            head = self._product(value)
            shape = self.graph.shapes.get(mask)
            if head is not None and shape is not None and len(shape) == 4 and shape[2] != 1:
                return (head[0], head[1], [last, *head[2]]), [mask]
        return None, None

    def _product(self, name: str) -> tuple[NodeProto, float, list[NodeProto]] | None:
        source, perm, scale, nodes = self._unwind(name)
        found = self.producers.get(source)
        if found is None or found.op_type != "MatMul" or perm != [0, 1, 2, 3]:
            return None
        return found, scale, nodes

    def _split(self, name: str, perm: list[int]) -> _Heads | None:
        """`name` as a transposed split into heads of a three-dimensional value."""
        source, found, scale, nodes = self._unwind(name)
        reshape = self.producers.get(source)
        if found != perm or reshape is None or reshape.op_type != "Reshape":
            return None
        target = self._constant(reshape.input[1])
        width = self._width(reshape.input[0])
        if target is None or len(target) != 4 or target[:3] != [0, 0, -1] or width is None:
            return None
        if len(self.graph.shapes.get(reshape.input[0], [])) != 3 or width % target[3]:
            return None
        size = target[3]
        return _Heads(reshape.input[0], width // size, size, scale, (*nodes, reshape))

    def _unwind(self, name: str) -> tuple[str, list[int], float, list[NodeProto]]:
        """Walk up through transposes and scalar factors: (value, joint perm, factor, nodes)."""
        perm, scale, nodes = [0, 1, 2, 3], 1.0, list[NodeProto]()
        while (at := self.producers.get(name)) is not None:
            if at.op_type == "Transpose" and len(attribute(at, "perm", [])) == 4:
                perm = [attribute(at, "perm", [])[p] for p in perm]
            elif at.op_type in ("Mul", "Div") and self._is_scalar(at.input[1]):
                factor = float(self.graph.arrays[at.input[1]].reshape(()))
                scale = scale * factor if at.op_type == "Mul" else scale / factor
            else:
                break
            nodes.append(at)
            name = at.input[0]
        return name, perm, scale, nodes

    def _width(self, name: str) -> int | None:
        """Size of the last axis of a linear map's output, read from its weight or bias."""
        at, arrays = self.producers.get(name), self.graph.arrays
        if at is None:
            return None
        if at.op_type in ("MatMul", "MatMulInteger", "Gemm"):
            weight = at.input[1]
            maker = self.producers.get(weight)
            if maker is not None and maker.op_type == "DequantizeLinear":
                weight = maker.input[0]
            if weight not in arrays or arrays[weight].ndim != 2:
                return None
            return int(arrays[weight].shape[0 if attribute(at, "transB", 0) else 1])
        if at.op_type not in ("Add", "Mul", "Cast"):
            return None
        for source in at.input:
            held = arrays.get(source)
            if held is not None and held.ndim == 1 and held.size > 1:
                return int(held.size)
        return next((w for w in map(self._width, at.input) if w is not None), None)

    def _only(self, before: NodeProto | None, op: str) -> NodeProto | None:
        """The one consumer of a node, if it is an `op` and the value is no graph output."""
        if before is None or before.output[0] in self.graph.outputs():
            return None
        after = self.consumers.get(before.output[0], [])
        return after[0] if len(after) == 1 and after[0].op_type == op else None

    def _constant(self, name: str) -> list[int] | None:
        held = self.graph.arrays.get(name)
        return None if held is None else [int(v) for v in np.ravel(held)]

    def _is_scalar(self, name: str) -> bool:
        return name in self.graph.arrays and self.graph.arrays[name].size == 1


def _raise_opset_(graph: OnnxGraph) -> None:
    """Declare the opset that has Attention; the operators we emit mean the same there."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, ATTENTION_OPSET)
    lowest = helper.find_min_ir_version_for(list(proto.opset_import))
    proto.ir_version = max(proto.ir_version, lowest)
    graph.proto = proto

