"""The inputs of a graph, as large as a workload says."""

from __future__ import annotations

from typing import Any

from zipc.core.axes import shape_of
from zipc.core.errors import ExportMismatch
from zipc.core.types import Workload


def graph_inputs(model: bytes, workload: Workload) -> dict[str, dict[str, Any]]:
    """The inputs of a serialised graph: shape and dtype by name.

    Raises:
        ExportMismatch: it is not an ONNX graph.
        UsageError: see `shape_of`.
    """
    import onnx

    try:
        graph = onnx.load_model_from_string(model).graph
    except Exception as error:  # protobuf's own
        raise ExportMismatch(
            f"ONNX cannot load the graph ({len(model)} bytes): {error}. Export it again."
        ) from error
    constants = {tensor.name for tensor in graph.initializer}
    found = {}
    for node in graph.input:
        if node.name in constants:
            continue
        tensor = node.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]
        found[node.name] = {
            "shape": list(shape_of(node.name, dims, workload)),
            "dtype": str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)),
        }
    return found
