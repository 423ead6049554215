"""Last step before a graph is written: what can only be said once all widths are known."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from onnx import NodeProto

from zipc.exporters.experts import sparse_experts_
from zipc.exporters.fusions import FUSED_OPSET, Finder
from zipc.exporters.graph import LINEAR, OnnxGraph, attribute, node


def finish(graph: OnnxGraph) -> None:
    """Run the passes that need final widths. Outputs stay as they were, to rounding."""
    sparse_experts_(graph)
    fuse_attention_(graph)


@dataclass(frozen=True, slots=True)
class _Heads:
    """A (batch, sequence, heads x size) value and the nodes that split it into heads.

    `tables` are the cosines and sines it is turned by, if it is; `past` what lies before it in the
    cache and the value that holds both; `groups` how often in a row every head is repeated.
    """

    source: str
    heads: int
    size: int
    scale: float
    tables: tuple[str, ...]
    past: tuple[str, ...]
    groups: int
    nodes: tuple[NodeProto, ...]


@dataclass(frozen=True, slots=True)
class _Block:
    query: _Heads
    key: _Heads
    value: _Heads
    masks: list[str]
    output: str
    scale: float
    nodes: tuple[NodeProto, ...]  # the last first

    @property
    def outputs(self) -> list[str]:
        """The result and, where there is a cache, keys and values with what is new."""
        return [self.output, *self.key.past[1:], *self.value.past[1:]]


def fuse_attention_(graph: OnnxGraph) -> None:
    """Write softmax(q k' scale + mask) v with its head splits and merge as one `Attention`.

    ONNX Runtime's CPU kernel reads and writes (batch, sequence, heads x size) without the four
    transposes, adds the mask while multiplying, reads one key and value for several queries without
    repeating them, and appends to a cache of keys and values. Rotary embeddings move in front of
    the splits. Attention of another shape stays as it is.
    """
    if not graph.can_raise_opset(FUSED_OPSET):
        return
    match = _Match(graph)
    blocks: list[_Block] = []
    for softmax in [n for n in graph.nodes if n.op_type == "Softmax"]:
        block = match.block(softmax)
        if block and not any(set(block.outputs) & set(b.outputs) for b in blocks):
            blocks.append(block)
    if not blocks:
        return
    graph.raise_opset_(FUSED_OPSET)
    uses = Counter(i for n in graph.nodes for i in n.input)
    uses.update(graph.outputs())
    dead: set[int] = set()
    for block in blocks:
        for output in block.outputs:
            uses[output] = 0
        for old in block.nodes:
            if not any(uses[o] > 0 for o in old.output) and id(old) not in dead:
                dead.add(id(old))
                uses.subtract(old.input)
    graph.nodes = [n for n in graph.nodes if id(n) not in dead]
    for block in blocks:
        inputs = [_turned(graph, heads) for heads in (block.query, block.key, block.value)]
        masks = _sum(graph, block.masks)
        if block.key.past:
            masks = [*masks, *[""] * (1 - len(masks)), block.key.past[0], block.value.past[0]]
        graph.nodes.append(
            node(
                "Attention",
                [*inputs, *masks],
                block.outputs,
                q_num_heads=block.query.heads,
                kv_num_heads=block.key.heads,
                scale=block.scale,
            )
        )


def _sum(graph: OnnxGraph, masks: list[str]) -> list[str]:
    """What is added to the scores as one value or none; layers share the sum."""
    if len(masks) < 2:
        return masks
    total = masks[0]
    for mask in masks[1:]:
        name = f"{total}_and_{mask}"
        if all(name not in n.output for n in graph.nodes):
            graph.nodes.append(node("Add", [total, mask], [name]))
        total = name
    return [total]


def _turned(graph: OnnxGraph, heads: _Heads) -> str:
    """The value that `Attention` reads: the source, or what a rotary embedding makes of it."""
    if not heads.tables:
        return heads.source
    name = f"{heads.source}_turned"
    if all(name not in n.output for n in graph.nodes):
        inputs = [heads.source, *heads.tables]
        graph.nodes.append(node("RotaryEmbedding", inputs, [name], num_heads=heads.heads))
    return name


class _Match:
    """Recognises attention around a Softmax; every method returns None where it is not there."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.find = Finder(graph)
        self.inputs = {i.name for i in graph.proto.graph.input}
        self.outputs = set(graph.outputs())

    def block(self, softmax: NodeProto) -> _Block | None:
        if attribute(softmax, "axis", -1) not in (-1, 3):
            return None
        scores = self._scores(softmax.input[0])
        after = self._only(softmax, "MatMul")
        merge = self._only(after, "Transpose")
        flat = self._only(merge, "Reshape")
        if scores is None or not after or not merge or not flat:
            return None
        if after.input[0] != softmax.output[0] or attribute(merge, "perm", []) != [0, 2, 1, 3]:
            return None
        if self.find.numbers(flat.input[1]) != [0, 0, -1]:
            return None
        (product, scale, nodes), masks = scores
        query = self._split(product.input[0], [0, 2, 1, 3])
        key = self._split(product.input[1], [0, 2, 3, 1])
        value = self._split(after.input[1], [0, 2, 1, 3])
        if not query or not key or not value or query.size != key.size:
            return None
        if value.scale != 1.0 or value.tables or query.groups != 1 or key.groups != value.groups:
            return None
        if query.past or bool(key.past) != bool(value.past):
            return None
        shared = key.heads == value.heads == key.groups == 1  # broadcast, not repeated
        if not shared and not (query.heads == key.heads * key.groups == value.heads * value.groups):
            return None
        return _Block(
            query,
            key,
            value,
            masks,
            flat.output[0],
            scale * query.scale * key.scale,
            (flat, merge, after, softmax, *nodes, product, *query.nodes, *key.nodes, *value.nodes),
        )

    def _scores(
        self, name: str
    ) -> tuple[tuple[NodeProto, float, list[NodeProto]], list[str]] | None:
        """(q k' product, factor on it, nodes after it) and what is added to it."""
        head = self._product(name)
        if head is not None:
            return head, []
        last = self.find.made_by(name, "Add")
        for value, mask in (last.input, reversed(last.input)) if last is not None else ():
            inner, shape = self._scores(value), self.graph.shapes.get(mask)
            if inner is None or last is None or shape is None or len(shape) != 4:
                continue
            if shape[2] == 1 != self.graph.shapes.get(last.output[0], [0] * 3)[2]:
                continue
            (product, scale, nodes), masks = inner
            return (product, scale, [last, *nodes]), [*masks, mask]
        return None

    def _product(self, name: str) -> tuple[NodeProto, float, list[NodeProto]] | None:
        way = _Way(self.find, name)
        found = self.find.made_by(way.at, "MatMul")
        if found is None or way.perm != [0, 1, 2, 3] or not way.plain:
            return None
        return found, way.scale, way.nodes

    def _split(self, name: str, perm: list[int]) -> _Heads | None:
        """`name` as a transposed split into heads of a three-dimensional value."""
        way = _Way(self.find, name)
        reshape = self.find.made_by(way.at, "Reshape")
        if way.perm != perm or reshape is None:
            return None
        target = self.find.numbers(reshape.input[1])
        width = self._width(reshape.input[0])
        if target is None or len(target) != 4 or target[:3] != [0, 0, -1] or width is None:
            return None
        if len(self.graph.shapes.get(reshape.input[0], [])) != 3 or width % target[3]:
            return None
        heads = width // target[3]
        nodes = (*way.nodes, reshape)
        return _Heads(
            reshape.input[0],
            heads,
            target[3],
            way.scale,
            way.tables,
            way.past,
            way.groups,
            nodes,
        )

    def _width(self, name: str) -> int | None:
        """Size of the last axis of a linear map's output, read from its weight or bias."""
        at, arrays = self.find.producers.get(name), self.graph.arrays
        if at is None:
            given = self.graph.shapes.get(name, [])[-1:] if name in self.inputs else []
            return next((size for size in given if isinstance(size, int)), None)
        if at.op_type in LINEAR:
            return self.graph.linear_width(at)
        if at.op_type == "Split":
            parts = self.find.numbers(at.input[1]) if len(at.input) > 1 else None
            return None if parts is None else parts[list(at.output).index(name)]
        if at.op_type not in ("Add", "Mul", "Cast"):
            return None
        for source in at.input:
            held = arrays.get(source)
            if held is not None and held.ndim == 1 and held.size > 1:
                return int(held.size)
        return next((w for w in map(self._width, at.input) if w is not None), None)

    def _only(self, before: NodeProto | None, op: str) -> NodeProto | None:
        """The one consumer of a node, if it is an `op` and the value is no graph output."""
        if before is None or before.output[0] in self.outputs:
            return None
        after = self.find.consumers.get(before.output[0], [])
        return after[0] if len(after) == 1 and after[0].op_type == op else None


class _Way:
    """The way up from a value through what moves its elements or scales them all.

    `at` is where it ends, `perm` the joint transposition; a rotary embedding, an appending to a
    cache and a repetition of heads are passed where they see (batch, heads, sequence, size).
    """

    def __init__(self, find: Finder, value: str) -> None:
        self.find = find
        self.at = value
        self.perm, self.scale = [0, 1, 2, 3], 1.0
        self.tables: tuple[str, ...] = ()
        self.past: tuple[str, ...] = ()
        self.groups = 1
        self.nodes: list[NodeProto] = []
        while self._step():
            pass

    @property
    def plain(self) -> bool:
        """Whether it passed nothing but transposes and factors."""
        return not self.tables and not self.past and self.groups == 1

    def _step(self) -> bool:
        """Go one node up, if it is one of those."""
        at = self.find.producers.get(self.at)
        if at is None:
            return False
        if at.op_type == "Transpose" and len(attribute(at, "perm", [])) == 4:
            self.perm = [attribute(at, "perm", [])[p] for p in self.perm]
        elif at.op_type in ("Mul", "Div") and self.find.scalar(at.input[1]) is not None:
            factor = self.find.scalar(at.input[1])
            assert factor is not None
            self.scale = self.scale * factor if at.op_type == "Mul" else self.scale / factor
        elif at.op_type == "RotaryEmbedding" and not self.tables and self._heads_in_place():
            self.tables = at.input[1], at.input[2]
        elif at.op_type == "Concat" and not self.past and self._appends(at):
            self.past = at.input[0], at.output[0]
            self.nodes.append(at)
            self.at = at.input[1]
            return True
        elif at.op_type == "Reshape" and self.groups == 1 and self._heads_in_place():
            return self._repetition(at)
        else:
            return False
        self.nodes.append(at)
        self.at = at.input[0]
        return True

    def _heads_in_place(self) -> bool:
        """Whether nothing below moved the axes of batch and heads."""
        return self.perm[:2] == [0, 1]

    def _appends(self, joined: NodeProto) -> bool:
        """Whether a node puts something in front of keys or values, in a cache that comes in."""
        inputs = {i.name for i in self.find.graph.proto.graph.input}
        if len(joined.input) != 2 or attribute(joined, "axis", 0) not in (2, -2):
            return False
        return joined.input[0] in inputs and self._heads_in_place() and not self.tables

    def _repetition(self, merge: NodeProto) -> bool:
        """Pass Unsqueeze, Expand and Reshape that write every head `groups` times in a row."""
        copies = self.find.made_by(merge.input[0], "Expand")
        apart = self.find.made_by(copies.input[0], "Unsqueeze") if copies is not None else None
        if copies is None or apart is None or self.find.numbers(apart.input[1]) != [2]:
            return False
        target = self.find.numbers(copies.input[1])
        merged = self.find.graph.shapes.get(merge.output[0], [])
        shape = self.find.graph.shapes.get(apart.input[0], [])
        if target is None or len(shape) != 4 or target[:2] + target[3:] != [1, 1, 1, 1]:
            return False
        if len(merged) != 4 or merged[0] != shape[0] or merged[2:] != shape[2:]:
            return False
        self.groups = target[2]
        self.nodes += [merge, copies, apart]
        self.at = apart.input[0]
        return True
