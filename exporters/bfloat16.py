"""Products in bf16 between casts, with standard operators."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import TensorProto, helper

from zipc.exporters.graph import OnnxGraph, attribute, node

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
                node("Cast", [f"{out}_bf16_product"], [out], to=TensorProto.FLOAT),
            ]
