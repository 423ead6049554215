"""The ONNX Runtime runner on small graphs made by hand, against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from zipc.core.errors import ExportMismatch, UsageError
from zipc.core.types import Workload
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner, default_feeds, one_line

SHAPE = ["batch", "sequence"]


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


def _matmul(weight: np.ndarray) -> bytes:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return _model(graph).SerializeToString()


def _embedding(rows: int = 100) -> bytes:
    """A graph with the inputs of a BERT; ids at or above `rows` make it fail."""
    kinds = {"input_ids": 7, "attention_mask": 7, "token_type_ids": 7, "position_ids": 6}
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["embedded"])]
    nodes += [helper.make_node("Identity", [name], [f"{name}_out"]) for name in kinds]
    outputs = [helper.make_tensor_value_info("embedded", 1, [*SHAPE, 4])]
    outputs += [helper.make_tensor_value_info(f"{n}_out", k, SHAPE) for n, k in kinds.items()]
    graph = helper.make_graph(
        nodes,
        "embedding",
        [helper.make_tensor_value_info(name, kind, SHAPE) for name, kind in kinds.items()],
        outputs,
        [numpy_helper.from_array(np.ones((rows, 4), np.float32), "table")],
    )
    return _model(graph).SerializeToString()


def test_outputs_equal_numpy_and_extra_feeds_are_ignored():
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((8, 3), "f4"), rng.standard_normal((5, 8), "f4")
    runner = OnnxRuntimeRunner(_matmul(weight), workload=Workload())
    got = runner.outputs({"x": x, "unused": x})
    assert list(got) == ["y"]
    np.testing.assert_allclose(got["y"], x @ weight, rtol=1e-5, atol=1e-6)


def test_default_inputs_of_a_bert_have_the_workloads_shape_and_meaning():
    session = ort.InferenceSession(_embedding(), providers=["CPUExecutionProvider"])
    feeds = default_feeds(session, Workload(batch_size=3, sequence_length=7))
    assert {feed.shape for feed in feeds.values()} == {(3, 7)}
    assert feeds["input_ids"].dtype == np.int64
    assert feeds["position_ids"].dtype == np.int32
    assert feeds["input_ids"].min() >= 0
    assert feeds["input_ids"].max() < 30
    assert len(np.unique(feeds["input_ids"])) > 5
    assert (feeds["attention_mask"] == 1).all()
    assert (feeds["token_type_ids"] == 0).all()
    assert (feeds["position_ids"] == np.arange(7)).all()


def test_default_inputs_depend_on_the_seed_and_name_only():
    session = ort.InferenceSession(_embedding(), providers=["CPUExecutionProvider"])
    first, again = (default_feeds(session, Workload()) for _ in range(2))
    other = default_feeds(session, Workload(), seed=1)
    assert (first["input_ids"] == again["input_ids"]).all()
    assert (first["input_ids"] != other["input_ids"]).any()


def test_concrete_dimensions_are_kept_and_floats_are_normal():
    model = _matmul(np.ones((64, 2), np.float32))
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = default_feeds(session, Workload(batch_size=50, sequence_length=9))["x"]
    assert x.shape == (50, 64)
    assert x.dtype == np.float32
    assert abs(float(x.std()) - 1) < 0.1


def test_run_returns_positive_milliseconds(tmp_path: Path):
    path = tmp_path / "graph.onnx"
    path.write_bytes(_embedding())
    runner = OnnxRuntimeRunner(path, workload=Workload(batch_size=2, sequence_length=16))
    assert all(runner.run() > 0 for _ in range(3))


@pytest.mark.parametrize("threads", [1, 2])
def test_idle_threads_do_not_spin_and_options_are_recorded(threads: int):
    model = _matmul(np.ones((4, 4), np.float32))
    options = OnnxRuntimeRunner(model, workload=Workload(threads=threads)).session_options
    assert options["intra_op_num_threads"] == threads
    assert options["inter_op_num_threads"] == 1
    assert options.get("session.intra_op.allow_spinning") == (None if threads == 1 else "0")
    assert options["providers"] == ["CPUExecutionProvider"]


def test_a_corrupt_graph_names_the_file(tmp_path: Path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(_embedding()[:50])
    with pytest.raises(ExportMismatch, match=r"cannot load .*broken\.onnx"):
        OnnxRuntimeRunner(path, workload=Workload())


def test_an_operator_that_the_runtime_lacks_is_named():
    graph = helper.make_graph(
        [helper.make_node("Frobnicate", ["x"], ["y"])],
        "unknown",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(ExportMismatch, match="Frobnicate"):
        OnnxRuntimeRunner(_model(graph).SerializeToString(), workload=Workload())


def test_a_graph_that_fails_on_its_data_is_reported():
    runner = OnnxRuntimeRunner(_embedding(rows=1), workload=Workload())
    with pytest.raises(ExportMismatch, match="cannot run"):
        runner.run()


def test_a_missing_file_and_a_missing_input_are_usage_errors(tmp_path: Path):
    with pytest.raises(UsageError, match="no ONNX file"):
        OnnxRuntimeRunner(tmp_path / "absent.onnx", workload=Workload())
    with pytest.raises(UsageError, match="position_ids"):
        OnnxRuntimeRunner(
            _embedding(),
            workload=Workload(),
            feeds={
                name: np.zeros((1, 4), np.int64)
                for name in ("input_ids", "attention_mask", "token_type_ids")
            },
        )


def _sized(*shapes: list[int | str]) -> ort.InferenceSession:
    """A graph that passes float inputs x0, x1, ... of the given shapes on."""
    names = [f"x{i}" for i in range(len(shapes))]
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in names],
        "sizes",
        [helper.make_tensor_value_info(n, 1, s) for n, s in zip(names, shapes, strict=True)],
        [
            helper.make_tensor_value_info(f"{n}_out", 1, s)
            for n, s in zip(names, shapes, strict=True)
        ],
    )
    content = _model(graph).SerializeToString()
    return ort.InferenceSession(content, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("shape", "workload", "expected"),
    [
        (["batch", 3, 8, 8], Workload(4, None, input_shapes={"x0": (4, 3, 8, 8)}), (4, 3, 8, 8)),
        (
            ["batch", 3, "h", "w"],
            Workload(1, None, input_shapes={"x0": (1, 3, 6, 5)}),
            (1, 3, 6, 5),
        ),
        (["batch", 16], Workload(4, None, input_shapes={"other": (4, 3)}), (4, 16)),
        (["16*batch", 7], Workload(3, None), (48, 7)),
        (["batch", 2, "past + 1", 4], Workload(2, None, past_length=9), (2, 2, 10, 4)),
        (["batch", "decoder_sequence"], Workload(2, 5), (2, 5)),
        (["s0", "s1"], Workload(2, 5), (2, 5)),
        ([3, "sequence"], Workload(2, 5), (3, 5)),
    ],
)
def test_sizes_come_from_the_shapes_then_the_names_then_the_places(
    shape: list[int | str], workload: Workload, expected: tuple[int, ...]
):
    assert default_feeds(_sized(shape), workload)["x0"].shape == expected


@pytest.mark.parametrize(
    ("shape", "workload", "message"),
    [
        (["batch", "height"], Workload(1, None), r"Axis 1 of input 'x0' \(height\) is open"),
        (["batch", 3], Workload(1, None, input_shapes={"x0": (1, 4)}), r"shape \[1, 4\], but"),
        (["batch", 3], Workload(1, None, input_shapes={"x0": (1, 3, 1)}), r"but the graph takes"),
    ],
)
def test_a_workload_that_does_not_fit_the_graph_is_refused(
    shape: list[int | str], workload: Workload, message: str
):
    with pytest.raises(UsageError, match=message):
        default_feeds(_sized(shape), workload)


def test_what_the_runtime_says_is_told_in_one_line_with_its_reason() -> None:
    said = "[E] : 1 : FAIL : running Sum node.\n" + "void f(ptrdiff_t) " * 60 + "256 by 2000.\n\n"
    line = one_line(RuntimeError(said))
    assert len(line) < 310
    assert line.startswith("[E] : 1 : FAIL : running Sum node. void")
    assert line.endswith("256 by 2000")
    assert one_line(RuntimeError("no graph.\n")) == "no graph"
