"""A network of convolutions in INT8 as a whole: the graph, and a compile that uses it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import zipc
import zipc.groundwork as groundwork
from tests.three_ways import single
from tests.tiny_project import Told, fake_clock, keep_timing_here, request, small_effort
from tests.zoo import ZOO
from zipc.build import FP32_BOUND, INT8_BOUND
from zipc.core.errors import ExportMismatch, UsageError
from zipc.core.types import Workload
from zipc.exporters.specialise import Edit, specialise
from zipc.integer_body import IntegerBody
from zipc.manifest import Manifest
from zipc.pipeline import compile_model, plan_model
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.profiler.runners.openvino import OpenVinoRunner, narrow_products
from zipc.pruner.graph.interpret import Variant
from zipc.runtimes import integer_kernels

NETS = """
import torch
from torch import nn

example_inputs = {"x": torch.zeros(1, 3, 16, 16)}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, and images whose classes are its own answers."""
    folder = tmp_path_factory.mktemp("convolutions")
    (folder / "nets.py").write_text(NETS)
    names: dict[str, Any] = {}
    exec(compile(NETS, "nets.py", "exec"), names)
    images = np.random.default_rng(0).standard_normal((400, 3, 16, 16), dtype=np.float32)
    with torch.no_grad():
        labels = names["net"]().eval()(torch.from_numpy(images)).argmax(1).numpy()
    np.savez(folder / "data.npz", x=images, labels=labels)
    return folder


def asked(project: Path, out: str, **rest: Any) -> Any:
    made = request(project / "data.npz", project / "data.npz", None, project / "cache")
    return replace(
        made,
        model=f"{project / 'nets.py'}:net",
        output=project / out,
        sequence_length=None,
        **rest,
    )


@pytest.fixture(scope="module")
def compiled(project: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        fake_clock(patch)
        small_effort(patch)
        compile_model(asked(project, "whole", speedup=1.5), progress=Told())
    return project / "whole"


@pytest.mark.parametrize(
    ("numerics", "runtime"), [("int8-dynamic", "onnxruntime"), ("bf16", "openvino")]
)
def test_what_is_for_linear_maps_is_refused_where_there_are_none(
    project: Path, numerics: str, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_clock(monkeypatch)
    small_effort(monkeypatch)
    monkeypatch.setattr(groundwork, "on_device", lambda target, _: target)
    wanted = replace(asked(project, numerics, speedup=1.5), numerics=numerics, runtime=runtime)
    with pytest.raises(UsageError, match=f"{numerics} is for linear maps"):
        compile_model(wanted, progress=Told())
    assert not (project / numerics).exists()


def test_where_int8_alone_is_fast_enough_nothing_is_removed(compiled: Path) -> None:
    manifest = Manifest.read(compiled)
    assert manifest.verdict == "validated"
    assert all(a.level.width == a.units for a in manifest.allocation)
    assert {a.level.numeric for a in manifest.allocation} == {"int8-static"}
    assert manifest.quality.metric == "accuracy"
    assert manifest.quality.dense == 100
    assert manifest.quality.compiled > 80
    assert any("INT8 ranges by" in note for note in manifest.latency.notes)
    assert "INT8 with exact sums: taken" in manifest.latency.notes


@pytest.mark.parametrize("possible", [("minmax",), ()])
def test_ranges_that_are_not_possible_are_told_and_others_taken(
    project: Path, monkeypatch: pytest.MonkeyPatch, possible: tuple[str, ...]
) -> None:
    fake_clock(monkeypatch)
    small_effort(monkeypatch)
    emit = IntegerBody.emit

    def without_histogram(self: IntegerBody, model: bytes, *, part: bool = False) -> bytes:
        if self.batches and self.ranges not in possible:
            raise ExportMismatch("Too many bins for data range.")
        return emit(self, model, part=part)

    monkeypatch.setattr(IntegerBody, "emit", without_histogram)
    made = asked(project, f"ranges{len(possible)}", speedup=1.5)
    if not possible:
        with pytest.raises(ExportMismatch, match="Too many bins"):
            compile_model(made, progress=Told())
        return
    notes = compile_model(made, progress=Told()).latency.notes
    assert "INT8 ranges by percentile are not possible: Too many bins for data range." in notes
    assert any(note.startswith("INT8 ranges by minmax; oracle") for note in notes)


def test_every_convolution_runs_on_integers(compiled: Path) -> None:
    model = onnx.load(compiled / "model.onnx")
    onnx.checker.check_model(model)
    assert {e.domain for e in model.opset_import} <= {"", "ai.onnx", "ai.onnx.ml"}
    assert "BatchNormalization" not in Counter(n.op_type for n in model.graph.node)
    assert integer_kernels(compiled / "model.onnx") >= 5


def test_the_checkpoint_is_near_the_graph(compiled: Path, project: Path) -> None:
    module = zipc.load(compiled, factory=f"{project / 'nets.py'}:net")
    images = np.load(project / "data.npz")["x"][:32]
    runner = OnnxRuntimeRunner(
        compiled / "model.onnx", workload=Workload(1, None), feeds={"x": images}
    )
    found = runner.outputs({"x": images})["output"]
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    assert np.linalg.norm(found - expected) <= INT8_BOUND * np.linalg.norm(expected)


def test_more_than_int8_gives_takes_units_too(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_clock(monkeypatch)
    small_effort(monkeypatch)
    whole = plan_model(asked(project, "none", speedup=1.4), progress=Told())
    units = {site.name: site.units for site in whole.sites}
    assert all(level.width == units[n] for n, level in whole.allocation.levels.items())
    fast = whole.dense_ms / whole.predicted_ms
    plan = plan_model(asked(project, "none", speedup=fast * 1.15), progress=Told())
    assert any(level.width < units[n] for n, level in plan.allocation.levels.items())
    assert {lv.numeric for lv in plan.allocation.levels.values() if lv.width} == {"int8-static"}


def test_fp32_stays_fp32(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch)
    small_effort(monkeypatch)
    plan = plan_model(asked(project, "none", speedup=1.3, numerics="fp32"), progress=Told())
    assert {lv.numeric for lv in plan.allocation.levels.values()} == {"fp32"}


def test_int8_that_gains_nothing_is_not_used(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_clock(monkeypatch)
    small_effort(monkeypatch)
    monkeypatch.setattr(OnnxRuntimeRunner, "run", lambda self: 1.0)
    keep_timing_here(monkeypatch)
    told = Told()
    monkeypatch.setattr("zipc.groundwork.price", _stop)
    with pytest.raises(_Stopped) as stopped:
        plan_model(asked(project, "none", speedup=1.3), progress=told)
    assert stopped.value.prepared.body is None
    assert told.notes["whole network in INT8"] == "1.00x unpruned: not used"


class _Stopped(Exception):
    def __init__(self, prepared: Any) -> None:
        self.prepared = prepared


def _stop(prepared: Any, *_: Any, **rest: Any) -> None:
    raise _Stopped(prepared)


@pytest.mark.xdist_group("zoo")
@pytest.mark.parametrize("ranges", ["minmax", "percentile"])
@pytest.mark.parametrize(
    "family", ["cifar-resnet8", "vgg", "mobilenet-v2", "mobilenet-v3", "densenet", "unet", "yolo"]
)
def test_networks_of_convolutions_keep_their_outputs(family: str, ranges: str) -> None:
    made, graph = single(family)
    dense = specialise(graph, Edit()).to_bytes()
    feeds = {k: v.numpy() for k, v in ZOO[family].example(batch=8).items()}
    body = IntegerBody(Workload(2, None, 1, {k: v.shape for k, v in feeds.items()}))
    body = replace(body.calibrated_on([feeds]), ranges=ranges)
    integer = body.emit(dense)
    kernels = integer_kernels(integer)
    assert kernels >= len([c for c in made.program.maps if c.convolution]) // 2
    runner = [OnnxRuntimeRunner(m, workload=body.workload, feeds=feeds) for m in (dense, integer)]
    exact, rounded = (r.outputs(feeds) for r in runner)
    expected, _ = made.executor.run(ZOO[family].example(batch=8), Variant())
    for name, value in exact.items():
        apart = np.linalg.norm(rounded[name] - value)
        assert 0 < apart <= INT8_BOUND * np.linalg.norm(value)
    first = exact["result_0"]
    assert np.linalg.norm(first - expected[0].numpy()) <= FP32_BOUND * np.linalg.norm(first)


@pytest.mark.parametrize(
    ("shape", "sums"), [((4, 1, 1), 0), ((1, 4, 1, 1), 0), ((1, 1, 8, 8), 1), ((1, 1, 1, 1), 1)]
)
def test_what_a_removed_block_adds_stays_on_integers(shape: tuple[int, ...], sums: int) -> None:
    rng = np.random.default_rng(0)

    def constant(name: str, *sizes: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.standard_normal(sizes, dtype=np.float32), name)

    make = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            make("Conv", ["x", "w"], ["a"], "first", pads=[1, 1, 1, 1]),
            make("Relu", ["a"], ["b"], "before"),
            make("Add", ["c", "b"], ["d"], "shift"),
            make("Relu", ["d"], ["e"], "after"),
            make("Conv", ["e", "v"], ["f"], "second", pads=[1, 1, 1, 1]),
            make("GlobalAveragePool", ["f"], ["y"], "pool"),
        ],
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4, 1, 1])],
        [constant("w", 4, 3, 3, 3), constant("v", 4, 4, 3, 3), constant("c", *shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    dense = bytes(model.SerializeToString())
    feeds = {"x": rng.standard_normal((8, 3, 8, 8), dtype=np.float32)}
    body = IntegerBody(Workload(8, None, 1, {"x": (8, 3, 8, 8)})).calibrated_on([feeds])
    integer = body.emit(dense)
    ops = Counter(node.op_type for node in onnx.load_from_string(integer).graph.node)
    assert (ops["Add"], ops["Conv"]) == (sums, 3 - sums)
    assert integer_kernels(integer) == 3 - sums
    exact, rounded = (
        OnnxRuntimeRunner(m, workload=body.workload, feeds=feeds).outputs(feeds)["y"]
        for m in (dense, integer)
    )
    assert np.linalg.norm(rounded - exact) <= INT8_BOUND * np.linalg.norm(exact)


def test_a_percentile_is_taken_of_as_many_rows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipc.integer_body.MEMORY", 1000)
    batches = [{"x": np.zeros((8, 3), np.float32)} for _ in range(5)]

    def taken(ranges: str, row_bytes: int) -> int:
        body = IntegerBody(Workload(), ranges=ranges, row_bytes=row_bytes).calibrated_on(batches)
        return sum(len(batch["x"]) for batch in body._batches())

    assert taken("minmax", 400) == 40
    assert taken("percentile", 400) == 2
    assert taken("percentile", 60) == 16
    assert taken("percentile", 4000) == 1


def test_a_graph_the_quantiser_refuses_is_an_error() -> None:
    with pytest.raises(ExportMismatch, match="cannot bring the graph to INT8"):
        IntegerBody(Workload()).emit(b"no graph")


def test_openvino_runs_such_a_network_on_integers(compiled: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model = compiled / "model.onnx"
    products = [n for n in onnx.load(model).graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(products) == 6
    assert narrow_products(model)["int8"] == 5  # all but the one that reads the images
    images = np.random.default_rng(1).standard_normal((4, 3, 16, 16), dtype=np.float32)
    mine, theirs = (
        runner(model, workload=Workload(4, None)).outputs({"x": images})["output"]
        for runner in (OpenVinoRunner, OnnxRuntimeRunner)
    )
    assert np.linalg.norm(mine - theirs) < INT8_BOUND * np.linalg.norm(theirs)
