"""The OpenVINO runner on small graphs, in this process and in one of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.exporters.test_openvino import emitted
from tests.profiler.test_runner_onnxruntime import _embedding, _matmul
from tests.relu_graph import WORKLOAD, graph
from zipc.core.errors import ExportMismatch, RemoteError, UsageError
from zipc.core.types import Workload
from zipc.numerics.int8 import STATIC
from zipc.profiler import agent
from zipc.profiler.device import LocalDevice
from zipc.profiler.runners.apart import TimingProcess
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.profiler.runners.openvino import OpenVinoRunner, narrow_products
from zipc.profiler.timing import interleave

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")


def test_outputs_equal_those_of_onnx_runtime_at_any_batch(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "model.onnx"
    path.write_bytes(_matmul(rng.standard_normal((8, 3), "f4")))
    runners = [r(path, workload=Workload()) for r in (OpenVinoRunner, OnnxRuntimeRunner)]
    for batch in (5, 2):
        x = rng.standard_normal((batch, 8), "f4")
        got, want = (runner.outputs({"x": x, "unused": x}) for runner in runners)
        assert list(got) == ["y"]
        np.testing.assert_allclose(got["y"], want["y"], rtol=1e-5, atol=1e-6)
        assert runners[0].run() > 0


def test_values_of_many_names_and_inputs_that_nothing_reads_are_fed_and_read() -> None:
    """As where a site is removed: its input goes straight on, and the mask is not read."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in "xmyz"]
    nodes = [
        helper.make_node("Identity", ["x"], ["also_x"]),
        helper.make_node("Relu", ["also_x"], ["y"]),
        helper.make_node("Identity", ["y"], ["z"]),
    ]
    made = helper.make_graph(nodes, "names", values[:2], values[2:])
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(made, opset_imports=opset, ir_version=10).SerializeToString()
    runner = OpenVinoRunner(model, workload=WORKLOAD)
    assert runner.run() > 0
    x = np.array([[-1, 0, 2]], np.float32)
    found = runner.outputs({"x": x, "m": x})
    np.testing.assert_array_equal(found["y"], np.maximum(x, 0))
    np.testing.assert_array_equal(found["z"], np.maximum(x, 0))


def test_made_up_inputs_are_those_of_onnx_runtime() -> None:
    model, workload = _embedding(), Workload(batch_size=3, sequence_length=7)
    mine, theirs = (r(model, workload=workload) for r in (OpenVinoRunner, OnnxRuntimeRunner))
    assert mine._feeds.keys() == theirs._feeds.keys()
    for name, values in mine._feeds.items():
        np.testing.assert_array_equal(values, theirs._feeds[name])
        assert values.dtype == theirs._feeds[name].dtype


def test_floats_are_fp32_and_threads_those_of_the_workload() -> None:
    runner = OpenVinoRunner(graph(), workload=Workload(1, None, 1, {"x": (5, 3)}))
    compiled = runner._session.compiled
    assert compiled.get_property(agent.PRECISION) == openvino.Type.f32
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert runner.session_options["INFERENCE_NUM_THREADS"] == 1
    assert "INFERENCE_NUM_THREADS" not in OpenVinoRunner.options(Workload(threads=0))


def test_another_precision_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_it_likes(core: Any, model: Any, device: str, options: dict[str, Any]) -> Any:
        options.pop(agent.PRECISION)
        return compile_model(core, model, device, {**options, agent.PRECISION: "bf16"})

    compile_model = openvino.Core.compile_model
    monkeypatch.setattr(openvino.Core, "compile_model", as_it_likes)
    with pytest.raises(agent.Failure, match="asked for f32 and computes in"):
        agent.OpenVinoSession(graph(), OpenVinoRunner.options(WORKLOAD))
    with pytest.raises(ExportMismatch, match="asked for f32"):
        OpenVinoRunner(graph(), workload=WORKLOAD)


def test_what_it_cannot_load_or_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ONNX file"):
        OpenVinoRunner(tmp_path / "none.onnx", workload=WORKLOAD)
    with pytest.raises(ExportMismatch, match=r"OpenVINO .* cannot load"):
        OpenVinoRunner(b"no graph", workload=WORKLOAD, feeds={})
    runner = OpenVinoRunner(_matmul(np.ones((8, 3), "f4")), workload=Workload())
    with pytest.raises(ExportMismatch, match=r"OpenVINO .* cannot run"):
        runner.outputs({"x": np.array([["text"]])})
    with pytest.raises(UsageError, match="needs the inputs"):
        runner.outputs({})


def test_graphs_are_timed_apart() -> None:
    apart = LocalDevice("openvino").timer()
    runners = [apart.load(graph(), workload=WORKLOAD) for _ in range(2)]
    samples = interleave(runners, rounds=3)
    assert [len(s) for s in samples] == [3, 3]
    assert all(ms > 0 for s in samples for ms in s)
    assert runners[0].session_options == OpenVinoRunner.opened_with(WORKLOAD)
    with pytest.raises(ExportMismatch, match=r"OpenVINO .* cannot load"):
        apart.load(graph().replace(b"Relu", b"Rulu"), workload=WORKLOAD)


def test_a_python_without_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("no openvino")

    monkeypatch.setitem(agent.OPENERS, "openvino", missing)
    with pytest.raises(agent.Failure, match="pip install openvino") as caught:
        agent.Session(b"", {}, {}, runtime="openvino")
    assert caught.value.kind == RemoteError.__name__


def test_two_runtimes_have_two_fingerprints() -> None:
    mine, theirs = (LocalDevice(name).fingerprint() for name in ("openvino", "onnxruntime"))
    changed = {name for name in mine if mine[name] != theirs[name]}
    assert changed == {"runtime", "runtime_version"}
    assert openvino.__version__.startswith(mine["runtime_version"])


def test_integer_products_are_counted_in_the_compiled_model() -> None:
    assert narrow_products(graph())["int8"] == 0
    assert narrow_products(emitted(STATIC))["int8"] > 0
    with pytest.raises(ExportMismatch, match="cannot load"):
        narrow_products(b"no graph")


def test_a_timing_process_is_of_one_runtime() -> None:
    timer = TimingProcess("openvino")
    assert timer.load(graph(), workload=WORKLOAD).session_options["device"] == "CPU"
