"""An ONNX graph as the kernels TensorRT runs, against those counted by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zipc.core.errors import UnsupportedModel
from zipc.core.types import Workload
from zipc.exporters.kernels import kernels_of
from zipc.latency_tables.operators import Attention, Pass, Product, linear

WORKLOAD = Workload(4, 16)
H = 32


def model(
    nodes: list[onnx.NodeProto],
    arrays: dict[str, np.ndarray],
    *,
    shape: tuple[int | str, ...] = ("batch", "sequence", H),
    outputs: tuple[str, ...] = ("y",),
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    return bytes(helper.make_model(graph, opset_imports=opset).SerializeToString())


def weight(*shape: int) -> np.ndarray:
    return np.ones(shape, dtype=np.float32)


def matmul(source: str, name: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", [source, f"w_{name}"], [name])


def test_what_follows_a_product_point_by_point_is_part_of_it() -> None:
    nodes = [
        matmul("x", "a"),
        helper.make_node("Add", ["a", "bias"], ["b"]),
        helper.make_node("Gelu", ["b"], ["y"]),
    ]
    found = kernels_of(model(nodes, {"w_a": weight(H, 64), "bias": weight(64)}), WORKLOAD)
    assert found == [linear(64, 64, H)]


def test_a_residual_sum_and_its_normalisation_are_one_pass() -> None:
    nodes = [
        matmul("x", "a"),
        helper.make_node("Add", ["a", "x"], ["b"]),
        helper.make_node("LayerNormalization", ["b", "scale", "shift"], ["y"]),
    ]
    arrays = {"w_a": weight(H, H), "scale": weight(H), "shift": weight(H)}
    assert kernels_of(model(nodes, arrays), WORKLOAD) == [linear(64, H, H), Pass(3 * 64 * H * 2)]


def test_products_of_one_input_are_one() -> None:
    nodes = [matmul("x", "q"), matmul("x", "k"), matmul("q", "z"), matmul("k", "y")]
    arrays = {n: weight(H, H) for n in ("w_q", "w_k", "w_z", "w_y")}
    found = kernels_of(model(nodes, arrays, outputs=("z", "y")), WORKLOAD)
    assert found == [linear(64, 2 * H, H), linear(64, H, H), linear(64, H, H)]


def test_scores_softmax_and_values_are_one_kernel() -> None:
    nodes = [
        matmul("x", "q"),
        helper.make_node("Reshape", ["q", "split"], ["heads"]),
        helper.make_node("Transpose", ["heads"], ["h"], perm=[0, 2, 1, 3]),
        helper.make_node("Transpose", ["heads"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["h", "t"], ["scores"]),
        helper.make_node("Div", ["scores", "root"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "h"], ["y"]),
    ]
    arrays = {
        "w_q": weight(H, H),
        "split": np.array([0, 0, 4, 8], dtype=np.int64),
        "root": np.array(2.8, dtype=np.float32),
    }
    found = kernels_of(model(nodes, arrays), WORKLOAD)
    assert [o for o in found if isinstance(o, Attention)] == [Attention(16, 16, 16, 8)]
    assert sum(isinstance(o, Product) for o in found) == 1


def test_rounded_products_run_in_int8_and_write_floats() -> None:
    pair = ["scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *pair], ["q"]),
        helper.make_node("DequantizeLinear", ["q", *pair], ["d"]),
        helper.make_node("DequantizeLinear", ["values", *pair], ["w"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    arrays = {
        "scale": np.array(0.1, dtype=np.float32),
        "zero": np.array(0, dtype=np.int8),
        "values": np.ones((H, 64), dtype=np.int8),
    }
    expected = linear(64, 64, H, precision="int8", written="fp16")
    assert kernels_of(model(nodes, arrays), WORKLOAD) == [expected]


@pytest.mark.parametrize(("zeros", "pattern"), [((0, 2), "2:4"), ((0,), "dense")])
def test_the_pattern_is_read_from_the_weights(zeros: tuple[int, ...], pattern: str) -> None:
    held = weight(H, 64)
    for zero in zeros:
        held[zero::4] = 0  # input channels
    (found,) = kernels_of(model([matmul("x", "y")], {"w_y": held}), WORKLOAD)
    assert isinstance(found, Product)
    assert found.pattern == pattern


def test_a_convolution_with_its_residual_and_activation_is_one_product() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "x"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    graph = model(nodes, {"w": weight(16, 16, 3, 3)}, shape=("batch", 16, 8, 8))
    (found,) = kernels_of(graph, WORKLOAD)
    assert isinstance(found, Product)
    assert (found.rows, found.columns, found.channels, found.positions) == (256, 16, 16, 9)
    assert found.moved_bytes == 256 * 16 * 3 * 2  # read, residual, written


def test_a_gate_is_a_pass_of_its_own() -> None:
    nodes = [
        matmul("x", "a"),
        helper.make_node("Sigmoid", ["a"], ["s"]),
        helper.make_node("Mul", ["a", "s"], ["y"]),
    ]
    found = kernels_of(model(nodes, {"w_a": weight(H, H)}), WORKLOAD)
    assert [type(o) for o in found] == [Product, Pass]


def test_sizes_computed_in_the_graph_are_followed() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=1, end=2),
        helper.make_node("Slice", ["table", "from", "n"], ["part"]),
        helper.make_node("Add", ["x", "part"], ["y"]),
    ]
    arrays = {"table": weight(512, H), "from": np.zeros(1, dtype=np.int64)}
    (found,) = kernels_of(model(nodes, arrays), WORKLOAD)
    assert found == Pass((2 * 64 * H + 16 * H) * 2)


def test_numbers_that_onnx_cannot_work_out_by_itself_stay_open() -> None:
    """As the token types of a BERT that is given none, gathered from a buffer by position."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], end=2),
        helper.make_node("Expand", ["zero", "sizes"], ["places"]),
        helper.make_node("GatherElements", ["table", "places"], ["rows"], axis=1),
        helper.make_node("Gather", ["types", "rows"], ["kinds"]),
        helper.make_node("Add", ["x", "kinds"], ["y"]),
    ]
    arrays = {
        "zero": np.zeros((1, 1), np.int64),
        "table": np.zeros((4, 512), np.int64),
        "types": weight(2, H),
    }
    assert kernels_of(model(nodes, arrays), WORKLOAD)


def test_a_pass_over_what_comes_in_is_not_launched() -> None:
    """All that is left of a site without units: the whole network normalises one kernel before."""
    nodes = [
        helper.make_node("Add", ["x", "constant"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "scale", "shift"], ["y"]),
    ]
    arrays = {name: weight(H) for name in ("constant", "scale", "shift")}
    assert kernels_of(model(nodes, arrays), WORKLOAD) == [Pass(2 * 64 * H * 2, fused=True)]


def test_an_axis_without_a_size_is_refused() -> None:
    graph = model([matmul("x", "y")], {"w_y": weight(H, H)}, shape=("batch", "frames", H))
    with pytest.raises(UnsupportedModel, match="axis 'frames'"):
        kernels_of(graph, WORKLOAD)
