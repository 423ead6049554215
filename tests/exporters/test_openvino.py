"""Graphs for OpenVINO run on integers there, and say the same in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.exporters.test_specialise import onnx_output, quantised, simulated, torch_output
from tests.tiny_models import case, dense_graph, everything, text
from zipc.core.errors import ExportMismatch
from zipc.core.types import Workload
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.openvino import OPENVINO
from zipc.exporters.specialise import Edit, Int8Weights, specialise
from zipc.numerics.int8 import DYNAMIC, STATIC
from zipc.profiler.runners.openvino import OpenVinoRunner, narrow_products

FAMILY = "bert"
LARGEST = 0.25  # see test_specialise: a value may fall on the other side of a rounding boundary


def emitted(numeric: str) -> bytes:
    made = case(FAMILY)
    edit, _ = quantised(made, everything(made), numeric)
    return specialise(dense_graph(FAMILY), edit, emitter=OPENVINO).to_bytes()


def test_the_graph_is_standard_and_equals_the_simulation_in_onnx_runtime() -> None:
    made = case(FAMILY)
    _, held = quantised(made, everything(made), STATIC)
    model = emitted(STATIC)
    onnx.checker.check_model(model, full_check=True)
    feeds = text(FAMILY, batch=2, length=7)
    want = torch_output(simulated(made, everything(made), STATIC, held), feeds)
    assert np.abs(onnx_output(model, feeds) - want).max() < LARGEST


def test_every_product_runs_on_integers_and_gives_what_onnx_runtime_gives() -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    made, model = case(FAMILY), emitted(STATIC)
    _, held = quantised(made, everything(made), STATIC)
    assert narrow_products(model)["int8"] == len(held)
    assert narrow_products(specialise(dense_graph(FAMILY), Edit()).to_bytes())["int8"] == 0
    feeds = text(FAMILY, batch=2, length=7)
    core = openvino.Core()
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model), "CPU", hint)
    names = {name for port in compiled.inputs for name in port.names}
    found = compiled({k: v.numpy() for k, v in feeds.items() if k in names})[0]
    assert np.abs(found - onnx_output(model, feeds)).max() < LARGEST


def test_a_dynamic_range_is_refused() -> None:
    with pytest.raises(ExportMismatch, match="int8-static"):
        emitted(DYNAMIC)


def test_a_gemm_with_its_bias_runs_on_integers_too() -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    rng = np.random.default_rng(0)
    values, bias = rng.integers(-9, 9, (32, 64)).astype(np.int8), rng.standard_normal(32, "f4")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 64), ("y", 32))
    ]
    held = {"l.weight": values.astype(np.float32), "l.bias": bias}
    gemm = helper.make_node("Gemm", ["x", "l.weight", "l.bias"], ["y"], transB=1)
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    dense = OnnxGraph.of(
        helper.make_model(helper.make_graph([gemm], "g", ends[:1], ends[1:], initializer=tensors))
    )
    dense.weights = {"l.weight": ("l.weight", False)}
    integers = Int8Weights(values, np.ones(32, np.float32), (0.5, 3))
    model = specialise(dense, Edit(int8={"l": integers}), emitter=OPENVINO).to_bytes()
    onnx.checker.check_model(model, full_check=True)
    assert narrow_products(model)["int8"] == 1
    x = 0.5 * rng.integers(-3, 9, (5, 64)).astype(np.float32)  # in the range, on its grid
    runner = OpenVinoRunner(model, workload=Workload(batch_size=5))
    np.testing.assert_allclose(runner.outputs({"x": x})["y"], x @ values.T + bias, rtol=1e-4)
