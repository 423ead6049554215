"""2:4 weights are found behind whatever an exporter puts between them and their product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from zipc.exporters.graph import OnnxGraph
from zipc.exporters.graph import node as make_node
from zipc.exporters.sparse_weights import SparseWeight, sparse_weights
from zipc.exporters.specialise import Edit, Int8Weights, specialise

HERE = Path()


def two_of_four(rows: int, columns: int) -> np.ndarray:
    """Integers (rows, columns) with two zeros in every four along the columns only."""
    values = np.random.default_rng(0).integers(1, 9, (rows, columns // 4, 4))
    values[..., 2:] = 0
    return values.reshape(rows, columns).astype(np.float32)


def model(nodes: list[NodeProto], arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    held = [numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], initializer=held))


SPARSE = two_of_four(32, 64)  # (out, in)
ONE, ZERO = np.array(1.0, np.float32), np.array(0, np.int8)
FORMS: dict[str, tuple[list[NodeProto], dict[str, np.ndarray]]] = {
    "MatMul [K, N]": ([make_node("MatMul", ["x", "w"], ["y"])], {"w": SPARSE.T}),
    "Gemm [K, N]": ([make_node("Gemm", ["x", "w"], ["y"])], {"w": SPARSE.T}),
    "Gemm transB": ([make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": SPARSE}),
    "Transpose": (
        [make_node("Transpose", ["w"], ["t"], perm=[1, 0]), make_node("MatMul", ["x", "t"], ["y"])],
        {"w": SPARSE},
    ),
    "Transpose without perm": (
        [make_node("Transpose", ["w"], ["t"]), make_node("MatMul", ["x", "t"], ["y"])],
        {"w": SPARSE},
    ),
    "experts": ([make_node("MatMul", ["x", "w"], ["y"])], {"w": np.stack([SPARSE.T, SPARSE.T])}),
    "Conv": (
        [make_node("Conv", ["x", "w"], ["y"])],
        {"w": np.broadcast_to(SPARSE[..., None, None], (32, 64, 3, 3)).copy()},
    ),
    "fp16 cast up": (
        [make_node("Cast", ["w"], ["c"], to=1), make_node("MatMul", ["x", "c"], ["y"])],
        {"w": SPARSE.T.astype(np.float16)},
    ),
    "float, Q, DQ, Transpose": (
        [
            make_node("QuantizeLinear", ["w", "one", "zero"], ["q"]),
            make_node("DequantizeLinear", ["q", "one", "zero"], ["d"]),
            make_node("Transpose", ["d"], ["t"], perm=[1, 0]),
            make_node("MatMul", ["x", "t"], ["y"]),
        ],
        {"w": SPARSE, "one": ONE, "zero": ZERO},
    ),
    "INT8, DQ": (
        [
            make_node("DequantizeLinear", ["w", "one"], ["d"]),
            make_node("MatMul", ["x", "d"], ["y"]),
        ],
        {"w": SPARSE.T.astype(np.int8), "one": ONE},
    ),
    "MatMulInteger": (
        [make_node("MatMulInteger", ["x", "w", "", "zero"], ["y"])],
        {"w": SPARSE.T.astype(np.int8), "zero": np.zeros(32, np.int8)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_pattern_is_seen_in_every_form_of_a_product(form: str) -> None:
    nodes, arrays = FORMS[form]
    assert sparse_weights(model(nodes, arrays), folder=HERE) == [SparseWeight("w", None, True)]


@pytest.mark.parametrize("form", FORMS)
def test_one_more_weight_in_one_group_breaks_it(form: str) -> None:
    nodes, arrays = FORMS[form]
    spoilt = arrays["w"].copy()
    spoilt[tuple(np.argwhere(spoilt == 0)[-1])] = 1
    found = sparse_weights(model(nodes, {**arrays, "w": spoilt}), folder=HERE)
    assert found == [SparseWeight("w", None, False)]


def test_zeros_along_the_outputs_are_not_the_pattern() -> None:
    nodes, _ = FORMS["MatMul [K, N]"]
    found = sparse_weights(model(nodes, {"w": two_of_four(64, 32)}), folder=HERE)
    assert found == [SparseWeight("w", None, False)]


def test_integers_around_another_zero_point_are_not_eligible() -> None:
    nodes, arrays = FORMS["MatMulInteger"]
    shifted = model(nodes, {**arrays, "zero": np.full(32, 3, np.int8)})
    (found,) = sparse_weights(shifted, folder=HERE)
    assert found.obstacle == "its zero point is not 0"


def test_small_weights_are_not_eligible_and_integers_need_more_channels() -> None:
    half = two_of_four(32, 16)
    floats = model(FORMS["MatMul [K, N]"][0], {"w": half.T})
    integers = model(FORMS["INT8, DQ"][0], {"w": half.T.astype(np.int8), "one": ONE})
    assert sparse_weights(floats, folder=HERE)[0].obstacle is None
    assert "16 input channels" in str(sparse_weights(integers, folder=HERE)[0].obstacle)


def test_a_weight_of_two_products_is_counted_once_and_activations_are_not() -> None:
    nodes = [
        make_node("MatMul", ["x", "w"], ["a"]),
        make_node("MatMul", ["a", "w"], ["b"]),
        make_node("MatMul", ["a", "b"], ["y"]),
    ]
    assert len(sparse_weights(model(nodes, {"w": SPARSE.T}), folder=HERE)) == 1


def test_weights_in_a_file_beside_the_graph_and_in_constant_nodes_are_read(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(SPARSE.T)),
        make_node("MatMul", ["x", "c"], ["a"]),
        make_node("Gemm", ["a", "w"], ["y"], transB=1),
    ]
    path = tmp_path / "model.onnx"
    made = model(nodes, {"w": two_of_four(32, 32)})
    onnx.save(made, path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    found = sparse_weights(onnx.load(path, load_external_data=False), folder=tmp_path)
    assert found == [SparseWeight("c", None, True), SparseWeight("w", None, True)]


@pytest.mark.parametrize("activation", [None, (0.1, 3)])
def test_the_integer_products_we_write_are_read_back(activation: tuple[float, int] | None) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])
    weight = numpy_helper.from_array(SPARSE, "l.weight")
    nodes = [make_node("Gemm", ["x", "l.weight"], ["y"], transB=1)]
    proto = helper.make_model(helper.make_graph(nodes, "g", [x], [y], initializer=[weight]))
    dense = OnnxGraph.of(proto)
    dense.weights = {"l.weight": ("l.weight", False)}
    integers = Int8Weights(SPARSE.astype(np.int8), np.ones(32, np.float32), activation)
    graph = specialise(dense, Edit(int8={"l": integers}))
    (found,) = sparse_weights(onnx.load_from_string(graph.to_bytes()), folder=HERE)
    assert (found.obstacle, found.conforms) == (None, True)
