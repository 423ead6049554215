"""Passes over the dense graph: shapes that survive pruning, residual sums, dead code."""

from __future__ import annotations

import numpy as np

from zipc.exporters.graph import OnnxGraph, live
from zipc.exporters.graph import node as new_node


def clean(graph: OnnxGraph) -> None:
    """Run all passes, in order. Each leaves the outputs of the graph as they were."""
    relative_reshapes_(graph)
    residual_sums_(graph)
    full_masks_(graph)
    drop_dead_(graph)


def relative_reshapes_(graph: OnnxGraph) -> None:
    """Write head splits and merges as [0, 0, -1, d] and [0, 0, -1].

    The graph then says the same for any number of heads, and the shape arithmetic that computed
    batch and sequence at run time becomes dead.
    """
    for node in graph.nodes:
        if node.op_type != "Reshape":
            continue
        before, after = graph.shapes.get(node.input[0]), graph.shapes.get(node.output[0])
        if not before or not after:
            continue
        same = 0
        while same < min(len(before), len(after)) and before[same] == after[same] and before[same]:
            same += 1
        old, new = before[same:], after[same:]
        if len(old) == 1 and len(new) == 2 and isinstance(new[1], int):
            target = [0] * same + [-1, new[1]]
        elif len(old) == 2 and len(new) == 1:
            target = [0] * same + [-1]
        else:
            continue
        name = "shape_" + "_".join(str(t) for t in target)
        graph.arrays[name] = np.array(target, dtype=np.int64)
        node.input[1] = name
        del node.attribute[:]  # allowzero


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
    Attention accepts it. Only for self-attention: queries and keys share an axis.
    """
    consumers = graph.consumers()
    softmaxed = {n.input[0] for n in graph.nodes if n.op_type == "Softmax"}
    for mask in list(consumers):
        shape = graph.shapes.get(mask, [])
        if len(shape) != 4 or shape[2] != 1 or shape[3] == 1 or mask in graph.arrays:
            continue
        full, keys, target = f"{mask}_full", f"{mask}_keys", f"{mask}_target"
        users = [
            n
            for n in consumers[mask]
            if n.op_type == "Add"
            and n.output[0] in softmaxed
            and graph.shapes.get(n.output[0], [])[-2:] == [shape[3], shape[3]]
        ]
        if not users:
            continue
        graph.arrays["one"] = np.array([1], dtype=np.int64)
        graph.nodes += [
            new_node("Shape", [mask], [keys], start=-1),
            new_node("Concat", ["one", "one", keys, keys], [target], axis=0),
            new_node("Expand", [mask, target], [full]),
        ]
        graph.shapes[full] = [shape[0], shape[1], shape[3], shape[3]]
        graph.types[full] = graph.types[mask]
        for user in users:
            user.input[list(user.input).index(mask)] = full


def drop_dead_(graph: OnnxGraph) -> None:
    """Drop nodes that no output needs, so that a graph equals itself read back from a file."""
    graph.nodes = live(graph.nodes, graph.outputs())
