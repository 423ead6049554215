"""What TensorRT 10.3 does not parse, or fp16 does not hold, written in operators and numbers it
takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto

from zipc.exporters.graph import OnnxGraph, attribute, node
from zipc.exporters.shapes import constant_

Doubles = np.ndarray[Any, np.dtype[np.float64]]
OPSET = 20  # the newest that TensorRT 10.3 parses; it has Gelu, and scales in fp16
MASKED = 3e4  # as good as infinity under a softmax; with scores added, half of what fp16 holds
INFINITE = 1e9  # from here on a constant in a sum stands for infinity
SQUARES = "sums of squares leave fp16"


def lower_(graph: OnnxGraph) -> None:
    """Run the passes. Outputs stay as they were, to rounding."""
    batch_norms_(graph)
    replaced = {"RMSNormalization": _rms_norm, "RotaryEmbedding": _rotation}
    made: list[NodeProto] = []
    for old in graph.nodes:
        made += replaced[old.op_type](graph, old) if old.op_type in replaced else [old]
    graph.nodes = made
    finite_masks_(graph)
    graph.set_opset_(OPSET)


def batch_norms_(graph: OnnxGraph) -> None:
    """Fold normalisations into the convolutions before them; make the rest a scale and a shift.

    Variances are often outside the range of fp16; what they do to the weights is not.
    """
    producers, consumers, outputs = graph.producers(), graph.consumers(), set(graph.outputs())
    graph.origin = dict(graph.origin)
    for norm in [n for n in graph.nodes if n.op_type == "BatchNormalization"]:
        scale, shift, mean, variance = (graph.arrays[i].astype(np.float64) for i in norm.input[1:5])
        factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        offset = shift - mean * factor
        before, source = producers.get(norm.input[0]), norm.input[0]
        alone = len(consumers[source]) == 1 and source not in outputs
        if before is not None and before.op_type == "Conv" and alone:
            _fold_(graph, before, factor, offset, producers)
            graph.nodes = [n for n in graph.nodes if n is not norm]
            before.output[0] = norm.output[0]
            if source in graph.origin:  # errors name the convolution
                graph.origin[norm.output[0]] = graph.origin[source]
            producers[norm.output[0]] = before
            continue
        at = norm.output[0]
        parts = (factor, offset, np.zeros_like(mean), np.ones_like(variance))
        names = [f"{at}_{part}" for part in ("factor", "offset", "mean", "variance")]
        graph.arrays |= {n: p.astype(np.float32) for n, p in zip(names, parts, strict=True)}
        new = node("BatchNormalization", [source, *names], [at], epsilon=0.0)
        graph.nodes = [new if n is norm else n for n in graph.nodes]


def _fold_(
    graph: OnnxGraph,
    conv: NodeProto,
    factor: Doubles,
    offset: Doubles,
    producers: dict[str, NodeProto],
) -> None:
    """Scale the output channels of a convolution, whose weight may be in INT8."""
    stem, dequantised = conv.output[0], producers.get(conv.input[1])
    stored = conv.input[1] if dequantised is None else dequantised.input[0]
    values = graph.arrays[stored].astype(np.float64)
    each = [-1, *[1] * (values.ndim - 1)]
    conv.input[1] = f"{stem}_weight"
    if dequantised is None:
        graph.arrays[conv.input[1]] = (values * factor.reshape(each)).astype(np.float32)
    else:  # a scale must be positive: the sign goes to the values
        _, scale, zero = dequantised.input
        names = [f"{stem}_int8", f"{stem}_int8_scale", zero]
        graph.arrays[names[0]] = (values * np.sign(factor).reshape(each)).astype(np.int8)
        positive = np.where(factor == 0, 1.0, np.abs(factor))
        graph.arrays[names[1]] = (graph.arrays[scale].astype(np.float64) * positive).astype("f4")
        graph.nodes.append(node("DequantizeLinear", names, [conv.input[1]], axis=0))
    bias = graph.arrays[conv.input[2]].astype(np.float64) if len(conv.input) > 2 else 0.0
    del conv.input[2:]
    conv.input.append(f"{stem}_bias")
    graph.arrays[f"{stem}_bias"] = (bias * factor + offset).astype(np.float32)


def _rms_norm(graph: OnnxGraph, old: NodeProto) -> list[NodeProto]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    source, weight = old.input
    at = old.output[0]
    graph.arrays[f"{at}_epsilon"] = np.array(attribute(old, "epsilon", 1e-5), dtype=np.float32)
    wide = [
        node("Mul", [source, source], [f"{at}_squares"]),
        node("ReduceMean", [f"{at}_squares", constant_(graph, [-1])], [f"{at}_mean"]),
        node("Add", [f"{at}_mean", f"{at}_epsilon"], [f"{at}_shifted"]),
        node("Sqrt", [f"{at}_shifted"], [f"{at}_root"]),
        node("Div", [source, f"{at}_root"], [f"{at}_normal"]),
    ]
    for step in wide:
        step.doc_string = SQUARES
    return [*wide, node("Mul", [f"{at}_normal", weight], [at])]


def _rotation(graph: OnnxGraph, old: NodeProto) -> list[NodeProto]:
    """Halves (low, high) of (batch, heads, sequence, size) turned by tables over the sequence."""
    source, *tables = old.input
    at, one = old.output[0], constant_(graph, [1])
    half = int(graph.shapes[source][-1]) // 2
    low, high, cos, sin = (f"{at}_{part}" for part in ("low", "high", "cos", "sin"))
    return [
        node("Split", [source, constant_(graph, [half, half])], [low, high], axis=-1),
        node("Unsqueeze", [tables[0], one], [cos]),
        node("Unsqueeze", [tables[1], one], [sin]),
        node("Mul", [low, cos], [f"{low}_cos"]),
        node("Mul", [high, sin], [f"{high}_sin"]),
        node("Sub", [f"{low}_cos", f"{high}_sin"], [f"{low}_turned"]),
        node("Mul", [high, cos], [f"{high}_cos"]),
        node("Mul", [low, sin], [f"{low}_sin"]),
        node("Add", [f"{high}_cos", f"{low}_sin"], [f"{high}_turned"]),
        node("Concat", [f"{low}_turned", f"{high}_turned"], [at], axis=-1),
    ]


def finite_masks_(graph: OnnxGraph) -> None:
    """Write what hides a score as a number that fp16 holds; infinities would add up to NaN."""
    held = {stored for stored, _ in graph.weights.values()}
    for step in graph.nodes:
        if step.op_type not in ("Add", "Sum", "Mul", "Where", "Expand"):
            continue
        for place, name in enumerate(step.input):
            array = graph.arrays.get(name)
            if array is None or name in held or array.dtype != np.float32:
                continue
            if (np.abs(array) >= INFINITE).any():
                step.input[place] = f"{name}_finite"
                graph.arrays[f"{name}_finite"] = array.clip(-MASKED, MASKED)
