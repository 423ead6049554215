"""INT8 for TensorRT: QuantizeLinear and DequantizeLinear at the input and the weight of a map.

Nothing else is quantised: not outputs, residual sums, norms or attention. TensorRT takes symmetric
S8 only, with one scale per activation and one per output channel of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto

from zipc.core.errors import ExportMismatch
from zipc.exporters.graph import OnnxGraph, attribute, node
from zipc.exporters.specialise import Int8Weights

CENTRE = 128  # zero point of a symmetric range in U8: x ~ scale * (q - 128), which is S8 with 0
QUANTISED = ("MatMul", "Gemm", "Conv")
TINIEST = float(np.finfo(np.float16).smallest_subnormal)


def quantise_(graph: OnnxGraph, maps: Mapping[str, Int8Weights]) -> None:
    """Put Q/DQ around maps. Those that read a value with the same range share its pair.

    Raises:
        ExportMismatch: see `emit`.
    """
    zero = "int8_zero_point"
    graph.arrays |= {zero: np.zeros((), dtype=np.int8)} if maps else {}
    rounded: dict[tuple[str, float], str] = {}
    for module, weights in maps.items():
        scale = _activation_scale(module, weights)
        for number, call in enumerate(graph.map_nodes(module + ".weight")):
            if call.op_type not in QUANTISED:
                raise ExportMismatch(
                    f"{module} is a {call.op_type}: TensorRT runs {', '.join(QUANTISED)} in INT8. "
                    f"Leave it in fp16, or use --exclude {module}."
                )
            key = (call.input[0], scale)
            if key not in rounded:
                rounded[key] = _rounded(graph, call.input[0], scale, zero)
            call.input[0] = rounded[key]
            call.input[1] = _weight(graph, call, weights, f"{module}.weight_{number}")


def _activation_scale(module: str, weights: Int8Weights) -> float:
    if weights.activation is None:
        raise ExportMismatch(
            f"{module} has no calibrated range, and TensorRT knows no dynamic one. "
            "Use --numerics int8-static or fp32."
        )
    scale, zero = weights.activation
    if zero != CENTRE:
        raise ExportMismatch(
            f"The range of {module} is not symmetric (zero point {zero}): TensorRT takes no other. "
            "Make it with zipc.numerics.int8.symmetric."
        )
    return max(float(np.float16(scale)), TINIEST)


def _rounded(graph: OnnxGraph, source: str, scale: float, zero: str) -> str:
    """A value after one QuantizeLinear and DequantizeLinear."""
    at = f"{source}_by_{scale}"
    graph.arrays[f"{at}_scale"] = np.array(scale, dtype=np.float32)
    graph.nodes += [
        node("QuantizeLinear", [source, f"{at}_scale", zero], [f"{at}_q"]),
        node("DequantizeLinear", [f"{at}_q", f"{at}_scale", zero], [f"{at}_dq"]),
    ]
    return f"{at}_dq"


def _weight(graph: OnnxGraph, call: NodeProto, weights: Int8Weights, name: str) -> str:
    """A weight as integers among the initialisers and one DequantizeLinear."""
    values, axis = weights.values, 0
    if call.op_type == "MatMul" or (call.op_type == "Gemm" and not attribute(call, "transB", 0)):
        values, axis = values.T, 1
    graph.arrays |= {
        f"{name}_int8": values,
        f"{name}_scale": weights.scale.astype(np.float32),
        f"{name}_zero": np.zeros(len(weights.scale), dtype=np.int8),
    }
    inputs = [f"{name}_int8", f"{name}_scale", f"{name}_zero"]
    graph.nodes.append(node("DequantizeLinear", inputs, [f"{name}_dq"], axis=axis))
    return f"{name}_dq"


def count_rounded_products(model: bytes) -> int:
    """Products of a graph whose factors both come from integers: TensorRT runs those in INT8."""
    graph = OnnxGraph.of(onnx.load_from_string(model))
    integers = {o for n in graph.nodes if n.op_type == "DequantizeLinear" for o in n.output}
    return sum(n.op_type in QUANTISED and integers.issuperset(n.input[:2]) for n in graph.nodes)


def scales_in_half_(graph: OnnxGraph) -> None:
    """Give weights scales that fp16 holds. Only below its normal numbers do values change."""
    for step in graph.nodes:
        values = graph.arrays.get(step.input[0]) if step.op_type == "DequantizeLinear" else None
        if values is None:
            continue
        scale = graph.arrays[step.input[1]].astype(np.float64)
        held = scale.astype(np.float16).astype(np.float64).clip(TINIEST)
        each = [1] * values.ndim
        each[attribute(step, "axis", 1)] = -1
        rounded = np.rint(values.astype(np.float64) * (scale / held).reshape(each))
        graph.arrays[step.input[0]] = rounded.clip(-127, 127).astype(np.int8)
        graph.arrays[step.input[1]] = held.astype(np.float32)
