"""Passes over the dense graph, in the order they run; each leaves its outputs as they were."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto

from zipc.exporters.fusions import Finder, fuse
from zipc.exporters.graph import OnnxGraph, live
from zipc.exporters.graph import node as new_node
from zipc.exporters.shapes import (
    Sizes,
    flat_linears_,
    relative_expands_,
    relative_reshapes_,
    sizes_from_inputs_,
    write_target_,
)

SMALL = 64  # elements up to which constants are compared


def clean(graph: OnnxGraph) -> None:
    """Run all passes. What remains says the same at other widths, in operators that run fast."""
    flat_linears_(graph)
    idle_nodes_(graph)
    sizes_from_inputs_(graph)
    relative_reshapes_(graph)
    relative_expands_(graph)
    merge_equal_(graph)
    drop_dead_(graph)
    fuse(graph)
    residual_sums_(graph)
    full_masks_(graph)
    merge_equal_(graph)
    drop_dead_(graph)


def idle_nodes_(graph: OnnxGraph) -> None:
    """Drop what changes nothing: a Reshape to the same shape, a Pad by 0, an idle mask."""
    find, outputs = Finder(graph), set(graph.outputs())
    same: dict[str, str] = {}
    for node in graph.nodes:
        source = _unchanged(find, node)
        if source is not None and node.output[0] not in outputs:
            same[node.output[0]] = source
    graph.nodes = [n for n in graph.nodes if n.output[0] not in same]
    _rename_(graph, same)


def _unchanged(find: Finder, node: NodeProto) -> str | None:
    """The input that a node hands on as it is."""
    shapes = find.graph.shapes
    if node.op_type == "Reshape":
        before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
        return node.input[0] if before and before == after and all(before) else None
    if node.op_type == "Pad" and not any(find.numbers(node.input[1]) or [1]):
        return str(node.input[0])
    if node.op_type in ("Add", "And"):
        for value, mask in (tuple(node.input), tuple(reversed(node.input))):
            if shapes.get(value) == shapes.get(node.output[0]) and _hides_nothing(find, mask):
                return str(value)
    return None


def _hides_nothing(find: Finder, mask: str) -> bool:
    """Whether a mask is true everywhere, or 0 where it is added."""
    chosen = find.made_by(mask, "Where")
    if chosen is not None:
        return find.scalar(chosen.input[1]) == 0.0 and _hides_nothing(find, chosen.input[0])
    spread = find.made_by(mask, "Expand")
    if spread is not None:
        return _hides_nothing(find, spread.input[0])
    held = find.graph.arrays.get(mask)
    return held is not None and held.dtype == np.bool_ and bool(held.all())


def merge_equal_(graph: OnnxGraph) -> None:
    """Compute once what several nodes compute from the same values: a mask for all layers, say."""
    outputs = set(graph.outputs())
    numbers: dict[tuple[object, ...], str] = {}
    first: dict[tuple[object, ...], NodeProto] = {}
    same: dict[str, str] = {}
    kept: list[NodeProto] = []
    for name, held in graph.arrays.items():
        if name not in graph.weights and held.size <= SMALL:
            key = (held.dtype.str, held.shape, held.tobytes())
            same[name] = numbers.setdefault(key, name)
    for node in graph.ordered():
        for i, source in enumerate(node.input):
            node.input[i] = same.get(source, source)
        attributes = sorted(a.SerializeToString() for a in node.attribute)
        found = first.setdefault((node.op_type, *node.input, *attributes), node)
        if found is node or outputs.intersection(node.output):
            kept.append(node)
        else:
            same |= dict(zip(node.output, found.output, strict=True))
    graph.nodes = kept
    _rename_(graph, same)


def _rename_(graph: OnnxGraph, names: Mapping[str, str]) -> None:
    """Read other values in the place of those that are keys of `names`."""

    def last(name: str) -> str:
        while name in names and names[name] != name:
            name = names[name]
        return name

    for node in graph.nodes:
        for i, source in enumerate(node.input):
            node.input[i] = last(source)
    graph.results = {k: last(v) for k, v in graph.results.items()}


def residual_sums_(graph: OnnxGraph) -> None:
    """Emit `Add` before a normalisation as `Sum`: the same value, not matched by a slow fusion.

    ONNX Runtime's SkipLayerNormalization kernel was measured 4x slower on CPU than the two
    operators apart.
    """
    consumers = graph.consumers()
    for node in graph.nodes:
        if node.op_type != "Add" or any(i in graph.arrays for i in node.input):
            continue
        if any(c.op_type == "LayerNormalization" for c in consumers.get(node.output[0], [])):
            node.op_type = "Sum"


def full_masks_(graph: OnnxGraph) -> None:
    """Spread a (batch, 1, 1, keys) mask over the queries once, where layers add it to scores.

    Adding it is then one long run per head instead of one short run per query, and the operator
    Attention accepts it.
    """
    consumers, sizes = graph.consumers(), Sizes(graph)
    softmaxed = {n.input[0] for n in graph.nodes if n.op_type == "Softmax"}
    for mask in list(consumers):
        shape = graph.shapes.get(mask, [])
        if len(shape) != 4 or shape[2] != 1 or shape[3] == 1 or mask in graph.arrays:
            continue
        for user in consumers[mask]:
            queries = graph.shapes.get(user.output[0], [])[-2:-1]
            if user.op_type != "Add" or user.output[0] not in softmaxed or queries in ([], [1]):
                continue
            size, full = sizes.of(queries[0]), f"{mask}_over_{queries[0]}"
            if size is None:
                continue
            if full not in graph.shapes:
                spread = new_node("Expand", [mask, ""], [full])
                write_target_(graph, spread, [1, 1, size, 1])
                graph.nodes.append(spread)
                graph.shapes[full] = [shape[0], shape[1], queries[0], shape[3]]
                graph.types[full] = graph.types[mask]
            user.input[list(user.input).index(mask)] = full


def drop_dead_(graph: OnnxGraph) -> None:
    """Drop what no output needs, so that a graph equals itself read back from a file."""
    graph.nodes = live(graph.nodes, graph.outputs())
    used = {i for n in graph.nodes for i in n.input} | set(graph.outputs())
    graph.arrays = {name: held for name, held in graph.arrays.items() if name in used}
    values = {o for n in graph.nodes for o in n.output} | {i.name for i in graph.proto.graph.input}
    graph.origin = {v: name for v, name in graph.origin.items() if v in values}
    graph.results = {name: v for name, v in graph.results.items() if v in values}
