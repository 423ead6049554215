"""Chains of small operations written as the one operator that says the same."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from onnx import NodeProto

from zipc.exporters.graph import OnnxGraph, attribute
from zipc.exporters.graph import node as new_node
from zipc.exporters.shapes import Sizes, constant_, write_target_

FUSED_OPSET = 23  # the first with RMSNormalization, RotaryEmbedding and Attention


def fuse(graph: OnnxGraph) -> None:
    """Run all fusions. ONNX Runtime's kernels for the whole were faster than the pieces in each."""
    if graph.can_raise_opset(FUSED_OPSET):
        rms_norms_(graph)
        rotary_embeddings_(graph)
    tanh_gelus_(graph)
    global_pools_(graph)


class Finder:
    """Looks around in a graph; every method gives None where what it looks for is not there."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.producers = graph.producers()
        self.consumers = graph.consumers()

    def made_by(self, value: str, *operators: str) -> NodeProto | None:
        """The node a value comes from, if it is one of `operators`."""
        found = self.producers.get(value)
        return found if found is not None and found.op_type in operators else None

    def scalar(self, value: str) -> float | None:
        """The number in an initialiser of one element."""
        held = self.graph.arrays.get(value)
        if held is None or held.size != 1 or value in self.graph.weights:
            return None
        return float(held.reshape(()))

    def scaled(self, node: NodeProto | None) -> tuple[str, float] | None:
        """(value, number) of a product, sum or power of a value and a number."""
        if node is None or len(node.input) != 2:
            return None
        pairs = [(node.input[0], node.input[1])]
        if node.op_type != "Pow":
            pairs.append((node.input[1], node.input[0]))
        for value, number in pairs:
            found = self.scalar(number)
            if found is not None and self.scalar(value) is None:
                return value, found
        return None

    def numbers(self, value: str) -> list[int] | None:
        held = self.graph.arrays.get(value)
        return None if held is None else [int(v) for v in np.ravel(held)]


def rms_norms_(graph: OnnxGraph) -> None:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    find = Finder(graph)
    made: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type != "Mul":
            continue
        for weight, inner in (tuple(node.input), tuple(reversed(node.input))):
            held = graph.arrays.get(weight)
            found = None if held is None or held.ndim != 1 else _normal(find, inner)
            if found is None:
                continue
            source, epsilon = found
            made.append(
                new_node(
                    "RMSNormalization", [source, weight], [node.output[0]], axis=-1, epsilon=epsilon
                )
            )
            break
    _replace_(graph, made)
    if made:
        graph.raise_opset_(FUSED_OPSET)


def _normal(find: Finder, value: str) -> tuple[str, float] | None:
    """(x, eps) if a value is x / sqrt(mean(x^2) + eps)."""
    product = find.made_by(value, "Mul", "Div")
    if product is None:
        return None
    for source, factor in (tuple(product.input), tuple(reversed(product.input))):
        root: NodeProto | None
        if product.op_type == "Mul":
            inverse = find.made_by(factor, "Reciprocal")
            root = find.made_by(inverse.input[0], "Sqrt") if inverse is not None else None
        else:
            root = find.made_by(factor, "Sqrt")
        shifted = find.scaled(find.made_by(root.input[0], "Add")) if root is not None else None
        mean = find.made_by(shifted[0], "ReduceMean") if shifted is not None else None
        if shifted is None or mean is None or attribute(mean, "keepdims", 1) != 1:
            continue
        axes, rank = find.numbers(mean.input[1]), len(find.graph.shapes.get(source, []))
        squared = find.made_by(mean.input[0], "Pow")
        if axes in ([-1], [rank - 1]) and find.scaled(squared) == (source, 2.0):
            return source, shifted[1]
    return None


def rotary_embeddings_(graph: OnnxGraph) -> None:
    """x cos + rotated(x) sin over (batch, heads, sequence, size), halves turned against each other.

    The operator takes one half of the tables, (batch, sequence, size / 2): the halves are equal.
    """
    find, sizes = Finder(graph), Sizes(graph)
    made: list[NodeProto] = []
    tables: dict[str, NodeProto] = {}
    for node in graph.nodes:
        found = _rotation(find, node)
        batch = sizes.of(graph.shapes[found[0]][0]) if found is not None else None
        if found is None or batch is None:
            continue
        source, *wide = found
        halves = []
        for table in wide:
            opened = find.producers[table].input[0]
            half, full = f"{opened}_half", f"{opened}_half_{batch}"
            tables |= {
                half: new_node("Slice", [opened, *_ends(graph, source)], [half]),
                full: new_node("Expand", [half, ""], [full]),
            }
            write_target_(graph, tables[full], [batch, 1, 1])
            shape = graph.shapes[source]
            size = int(shape[-1]) // 2
            graph.shapes |= {
                half: [*graph.shapes[opened][:2], size],
                full: [shape[0], shape[2], size],
            }
            graph.types |= dict.fromkeys((half, full), graph.types[opened])
            halves.append(full)
        made.append(new_node("RotaryEmbedding", [source, *halves], [node.output[0]]))
    _replace_(graph, made)
    graph.nodes += tables.values()
    if made:
        graph.raise_opset_(FUSED_OPSET)


def _ends(graph: OnnxGraph, source: str) -> list[str]:
    """Where the first half of the last axis begins and ends, and that it is the last axis."""
    half = int(graph.shapes[source][-1]) // 2
    return [constant_(graph, [n]) for n in (0, half, -1)]


def _rotation(find: Finder, node: NodeProto) -> tuple[str, str, str] | None:
    """(x, cos, sin) if a node is the sum of x cos and the rotated x sin."""
    if node.op_type not in ("Add", "Sum") or len(node.input) != 2:
        return None
    for one, other in (tuple(node.input), tuple(reversed(node.input))):
        plain, turned = find.made_by(one, "Mul"), find.made_by(other, "Mul")
        if plain is None or turned is None:
            continue
        for rotated, sin in (tuple(turned.input), tuple(reversed(turned.input))):
            source = _rotated(find, rotated)
            if source is None or source not in plain.input:
                continue
            cos = plain.input[1 - list(plain.input).index(source)]
            shape = find.graph.shapes.get(source, [])
            if len(shape) == 4 and all(_is_table(find, t, shape) for t in (cos, sin)):
                return source, cos, sin
    return None


def _rotated(find: Finder, value: str) -> str | None:
    """x if a value is (-second half, first half) of x along its last axis."""
    joined = find.made_by(value, "Concat")
    if joined is None or len(joined.input) != 2:
        return None
    minus, low = find.made_by(joined.input[0], "Neg"), find.made_by(joined.input[1], "Slice")
    high = find.made_by(minus.input[0], "Slice") if minus is not None else None
    if low is None or high is None or low.input[0] != high.input[0]:
        return None
    shape = find.graph.shapes.get(low.input[0], [])
    if not shape or not isinstance(shape[-1], int) or shape[-1] % 2:
        return None
    size, last = shape[-1], len(shape) - 1
    if attribute(joined, "axis", 0) not in (-1, last):
        return None
    for part, begin, end in ((low, 0, size // 2), (high, size // 2, size)):
        read = [find.numbers(i) for i in part.input[1:]]
        if len(read) < 3 or None in read or read[2] not in ([-1], [last]):
            return None
        if read[0] != [begin] or not read[1] or min(read[1][0], size) != end:
            return None
        if len(read) > 3 and read[3] != [1]:
            return None
    return str(low.input[0])


def _is_table(find: Finder, value: str, shape: list[int | str]) -> bool:
    """Whether a value is (1 or batch, 1, sequence, size), made of two equal halves."""
    own = find.graph.shapes.get(value, [])
    opened = find.made_by(value, "Unsqueeze")
    if opened is None or len(own) != 4 or own[1] != 1 or own[2:] != shape[2:]:
        return False
    at, shapes = opened.input[0], find.graph.shapes
    while True:
        joined = find.made_by(at, "Concat")
        if joined is not None:
            last = attribute(joined, "axis", 0) in (-1, len(shapes.get(at, [])) - 1)
            return last and len(joined.input) == 2 and joined.input[0] == joined.input[1]
        step = find.made_by(at, "Cos", "Sin", "Cast", "Mul", "Unsqueeze")
        scaled = find.scaled(step) if step is not None and step.op_type == "Mul" else None
        if step is None or (step.op_type == "Mul" and scaled is None):
            return False
        at = step.input[0] if scaled is None else scaled[0]
        if shapes.get(at, [])[-1:] != shape[-1:]:
            return False


def tanh_gelus_(graph: OnnxGraph) -> None:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    find = Finder(graph)
    found = {n.output[0]: _tanh_gelu(find, n) for n in graph.nodes if n.op_type == "Mul"}
    _replace_(
        graph,
        [new_node("Gelu", [x], [y], approximate="tanh") for y, x in found.items() if x is not None],
    )


def _tanh_gelu(find: Finder, node: NodeProto) -> str | None:
    for one, other in (tuple(node.input), tuple(reversed(node.input))):
        half = find.scaled(find.made_by(one, "Mul"))
        shifted = find.scaled(find.made_by(other, "Add"))
        if half is None or shifted is None or (half[1], shifted[1]) != (0.5, 1.0):
            continue
        tanh = find.made_by(shifted[0], "Tanh")
        inner = find.scaled(find.made_by(tanh.input[0], "Mul")) if tanh is not None else None
        total = find.made_by(inner[0], "Add") if inner is not None else None
        if inner is None or total is None or half[0] not in total.input:
            continue
        if not math.isclose(inner[1], math.sqrt(2.0 / math.pi), rel_tol=1e-6):
            continue
        cubic = total.input[1 - list(total.input).index(half[0])]
        cube = find.scaled(find.made_by(cubic, "Mul"))
        if cube is None or not math.isclose(cube[1], 0.044715, rel_tol=1e-6):
            continue
        if find.scaled(find.made_by(cube[0], "Pow")) == (half[0], 3.0):
            return half[0]
    return None


def global_pools_(graph: OnnxGraph) -> None:
    """The mean over all positions of an image, as the operator that reads blocked layouts."""
    find = Finder(graph)
    for node in list(graph.nodes):
        if node.op_type != "ReduceMean" or len(node.input) != 2:
            continue
        shape, axes = graph.shapes.get(node.input[0], []), find.numbers(node.input[1])
        if len(shape) != 4 or axes is None or sorted(a % 4 for a in axes) != [2, 3]:
            continue
        source, result = node.input[0], node.output[0]
        graph.nodes.remove(node)
        pooled = result
        if attribute(node, "keepdims", 1) == 0:
            pooled = f"{result}_pooled"
            flat = new_node("Reshape", [pooled, constant_(graph, [0, -1])], [result])
            graph.nodes.append(flat)
            graph.shapes[pooled], graph.types[pooled] = [*shape[:2], 1, 1], graph.types[result]
        graph.nodes.append(new_node("GlobalAveragePool", [source], [pooled]))


def _replace_(graph: OnnxGraph, made: Iterable[NodeProto]) -> None:
    """Put nodes in the place of those whose outputs they make."""
    new = {n.output[0]: n for n in made}
    graph.nodes = [new.get(n.output[0], n) for n in graph.nodes]
