"""The smallest graph worth timing, and the workload it is timed on."""

from __future__ import annotations

from onnx import TensorProto, helper

from zipc.core.types import Workload

WORKLOAD = Workload(batch_size=2, sequence_length=None, threads=1)


def graph(axis: int | str = "batch") -> bytes:
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [axis, 3]) for n in ("x", "y")]
    node = helper.make_node("Relu", ["x"], ["y"])
    made = helper.make_graph([node], "relu", shapes[:1], shapes[1:])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return bytes(model.SerializeToString())
