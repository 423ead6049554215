"""The graph for OpenVINO on a CPU: INT8 as Q/DQ at the input and the weight of a linear map.

OpenVINO makes integer products of static pairs only: the integer operators that ONNX Runtime is
given run there in floats, slower than no quantisation at all. Attention stays in pieces, which it
fuses by itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from zipc.core.errors import ExportMismatch
from zipc.exporters.experts import sparse_experts_
from zipc.exporters.graph import OnnxGraph, node
from zipc.exporters.specialise import Int8Weights, graph_name


class OpenVino:
    """The `Emitter` for OpenVINO: U8 x S8 products."""

    def quantise_(self, graph: OnnxGraph, maps: Mapping[str, Int8Weights], *, part: bool) -> None:
        """Put Q/DQ around maps. Those that read a value with the same range share its pair.

        Raises:
            ExportMismatch: a range is dynamic.
        """
        rounded: dict[tuple[str, tuple[float, int]], str] = {}
        for module, weights in maps.items():
            if weights.activation is None:
                raise ExportMismatch(
                    f"{module} has no calibrated range, and OpenVINO has no integer kernels for a "
                    "dynamic one. Use --numerics int8-static or fp32."
                )
            for call in graph.map_nodes(module + ".weight"):
                key = (call.input[0], weights.activation)
                if key not in rounded:
                    rounded[key] = _rounded(graph, *key)
                stem = graph_name(call)
                graph.arrays[stem + "_values"] = weights.values.T
                graph.arrays[stem + "_scale"] = weights.scale.astype(np.float32)
                pair = [stem + "_values", stem + "_scale"]
                graph.nodes.append(node("DequantizeLinear", pair, [stem + "_floats"], axis=1))
                out = graph.take_product_(call)
                graph.nodes.append(node("MatMul", [rounded[key], stem + "_floats"], [out]))

    def finish_(self, graph: OnnxGraph) -> None:
        sparse_experts_(graph)


OPENVINO = OpenVino()


def _rounded(graph: OnnxGraph, source: str, activation: tuple[float, int]) -> str:
    """A value after one QuantizeLinear and DequantizeLinear."""
    scale, zero = activation
    at = f"{source}_by_{scale}_{zero}"
    graph.arrays[at + "_scale"] = np.array(scale, dtype=np.float32)
    graph.arrays[at + "_zero"] = np.array(zero, dtype=np.uint8)
    pair = [at + "_scale", at + "_zero"]
    graph.nodes += [
        node("QuantizeLinear", [source, *pair], [at + "_q"]),
        node("DequantizeLinear", [at + "_q", *pair], [at + "_floats"]),
    ]
    return at + "_floats"
