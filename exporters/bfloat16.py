"""Products in bf16 between casts, with standard operators.

Where a graph has INT8 as well, OpenVINO takes a Cast to fp32 for the end of a dequantisation, and
moves it on past what follows; in attention it gives one of two inputs of a product to bf16, and
then refuses the graph (2026.4). It moves nothing past a maximum, which costs 1 % of MiniLM.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import TensorProto, helper

from zipc.exporters.graph import OnnxGraph, attribute, node

LOWEST = "lowest"
DTYPE = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)


def bfloat16_(graph: OnnxGraph, modules: Collection[str]) -> None:
    """Let linear maps multiply in bf16; those that read the same value share its cast."""
    casts: dict[str, str] = {}
    for module in modules:
        for call in graph.map_nodes(module + ".weight"):
            source, weight = call.input[0], graph.arrays[call.input[1]]
            if source not in casts:
                casts[source] = f"{source}_bf16"
                graph.nodes.append(node("Cast", [source], [casts[source]], to=TensorProto.BFLOAT16))
            held = f"{call.input[1]}_bf16"
            if attribute(call, "transB", 0):
                weight = weight.T
            graph.arrays[held] = np.ascontiguousarray(weight).astype(DTYPE)
            out = graph.take_product_(call)
            graph.nodes += [
                node("MatMul", [casts[source], held], [f"{out}_bf16_product"]),
                node("Cast", [f"{out}_bf16_product"], [f"{out}_floats"], to=TensorProto.FLOAT),
                node("Max", [f"{out}_floats", LOWEST], [out]),
            ]
    if casts:
        graph.arrays[LOWEST] = np.array(np.finfo(np.float32).min, np.float32)
