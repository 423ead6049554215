"""Compiles for a device that is not here: predicted from a modelled table, never validated."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from tests.command_line import Run
from tests.price_tables import prices_by
from tests.tiny_folders import save_family
from tests.tiny_project import Told, request
from zipc import groundwork, pipeline
from zipc.bench import bench
from zipc.cli.compile import verdict_exit_code
from zipc.core.errors import EngineFailed, UsageError
from zipc.core.types import Allocation, InputSpec, Level
from zipc.devices import open_device
from zipc.exporters.kernels import kernels_of
from zipc.exporters.specialise import Edit
from zipc.gate import check
from zipc.groundwork import price_model
from zipc.latency_tables.modelled import Doubt, device_model
from zipc.latency_tables.operators import Product
from zipc.manifest import Manifest
from zipc.modelled_device import ModelledGraph, predicted_timing
from zipc.pipeline import compile_model, plan_model
from zipc.profiling import profile_model
from zipc.targets import load_target

pytestmark = pytest.mark.usefixtures("little_effort")


@dataclass
class Project:
    model: Path
    data: Path
    cache: Path
    out: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def project(sources: tuple[Path, Path], little_effort: None) -> Project:
    model, data = sources
    root = model.parent
    asked = request(model, data, root / "out", root / "cache", target="a100", speedup=1.5)
    asked = replace(asked, layout="triton")
    manifest = compile_model(asked, progress=Told())
    return Project(model, data, root / "cache", root / "out", manifest)


def test_a_compile_ends_predicted_with_an_interval(project: Project) -> None:
    latency = Manifest.read(project.out).latency
    assert project.manifest.verdict == "predicted"
    assert latency.table_kind == "modelled"
    assert latency.speedup is not None
    assert latency.speedup_ci95 is not None
    low, high = latency.speedup_ci95
    assert latency.speedup >= 1.5
    assert low < latency.speedup < high
    half = device_model("a100").half_width["width"]
    assert math.log(high / latency.speedup) == pytest.approx(half)


def test_nothing_is_passed_off_as_measured(project: Project) -> None:
    latency = project.manifest.latency
    times = (latency.reference_ms, latency.compiled_ms, latency.p90_ms, latency.p99_ms)
    assert times == (None, None, None, None)
    assert (latency.pairs, latency.prediction_error, latency.speedup_vs_best_dense) == (None,) * 3
    assert any("nothing was measured" in note for note in latency.notes)
    assert latency.by_default is None
    assert not (project.out / "samples.json").exists()
    assert not any("timed" in file.kind for file in project.manifest.files)


def test_quality_is_read_from_the_graph_and_levels_are_in_fp16(project: Project) -> None:
    assert project.manifest.quality is not None
    assert project.manifest.quality.compiled is not None
    kept = [a.level for a in project.manifest.allocation if not a.level.removed]
    assert {level.numeric for level in kept} <= {"fp16", "int8-static"}


def test_the_model_repository_holds_the_same_graph_and_is_named_after_the_model(
    project: Project,
) -> None:
    folder = project.out / "triton" / project.model.name
    assert (folder / "1/model.onnx").read_bytes() == (project.out / "model.onnx").read_bytes()
    assert "tensorrt" in (folder / "config.pbtxt").read_text()
    kinds = {f.kind for f in project.manifest.files if f.path.startswith("triton/")}
    assert kinds == {"model repository for Triton"}


@pytest.mark.parametrize("name", ["model.onnx", "reference.onnx"])
def test_both_graphs_are_in_fp16(project: Project, name: str) -> None:
    graph = onnx.load(project.out / name).graph
    matrices = [i for i in graph.initializer if len(i.dims) == 2 and min(i.dims) > 1]
    assert {TensorProto.FLOAT16} <= {i.data_type for i in matrices}
    assert TensorProto.FLOAT not in {i.data_type for i in matrices}


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"
)
def test_an_engine_of_a_pruned_sparse_graph_in_int8(project: Project) -> None:
    out = project.out.with_name("engine")
    asked = request(project.model, project.data, out, project.cache, target="a100", speedup=1.1)
    asked = replace(asked, numerics="int8", pattern="2:4", engine="rtx")
    manifest = compile_model(asked, progress=Told())
    assert manifest.verdict == "predicted"
    assert any(a.level.width < (a.units or 0) for a in manifest.allocation)
    kept = {str(a.level).partition("@")[2] for a in manifest.allocation if not a.level.removed}
    assert kept == {"int8-static+2:4"}
    operators = {n.op_type for n in onnx.load(out / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    (engine,) = [f for f in manifest.files if f.path == "model.engine"]
    assert "never run" in engine.kind
    (told,) = [n for n in manifest.latency.notes if n.startswith("engine by TensorRT-RTX")]
    assert "sm80, never run: not read back" in told
    assert (out / "model.engine").stat().st_size > 1000


def test_a_builder_that_fails_leaves_the_output_as_it_was(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EngineFailed("The TensorRT builder wanted more than 1 MB of memory.")

    out = shutil.copytree(project.out, project.out.with_name("earlier"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr(pipeline, "build_engine", fail)
    for module in (pipeline, groundwork):
        monkeypatch.setattr(module, "choose_builder", lambda asked, *_: asked)
    asked = request(project.model, project.data, out, project.cache, target="a100", speedup=1.5)
    with pytest.raises(EngineFailed, match="more than 1 MB"):
        compile_model(replace(asked, engine="trt"), progress=Told())
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert not list(out.parent.glob(".earlier*"))


def test_a_builder_that_is_not_here_is_told_before_anything_is_loaded(
    run: Run, project: Project
) -> None:
    code, _, err = run(
        *("compile", str(project.model), "--target", "orin", "--speedup", "2x", "--engine", "rtx"),
        *("--data", str(project.data), "-o", str(project.out.with_name("x")), "--dry-run"),
    )
    assert code == 2
    assert "sm87" in err
    assert "build.sh" in err


def test_an_engine_for_a_processor_is_refused(run: Run, project: Project) -> None:
    code, _, err = run(
        *("compile", str(project.model), "--speedup", "2x", "--data", str(project.data)),
        *("-o", str(project.out.with_name("x")), "--engine", "rtx", "--dry-run"),
    )
    assert code == 2
    assert "under TensorRT" in err


def test_a_predicted_verdict_is_a_failure_only_where_more_is_required() -> None:
    assert verdict_exit_code("predicted", require=None) == 0
    assert verdict_exit_code("predicted", require="validated") == 1


def test_inspect_says_that_it_was_not_measured(run: Run, project: Project) -> None:
    code, out, _ = run("inspect", str(project.out))
    assert code == 0
    assert "modelled, not measured" in out
    assert "build.sh  (on the device" in out
    assert "zipc bench" not in out


def test_bench_and_check_refuse_to_time_it_here(project: Project) -> None:
    for attempt in (
        lambda: bench(project.out),
        lambda: check(project.out, project.out),
    ):
        with pytest.raises(UsageError, match=r"target 'a100'.*build\.sh"):
            attempt()


def test_profile_and_plan_answer_from_the_same_table(project: Project) -> None:
    asked = request(project.model, project.data, None, project.cache, target="a100", speedup=1.5)
    found = profile_model(asked, progress=Told())
    assert found.from_cache
    assert found.kind == "modelled"
    assert json.loads(found.table_path.read_text())["kind"] == "modelled"
    plan = plan_model(asked, progress=Told())
    assert plan.predicted_speedup >= 1.5
    assert plan.dense_ms == pytest.approx(found.dense_ms)


GRID = {"fp16": 8, "int8-static": 32}
NET = """
import torch

def net():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 40, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(40, 16, 3, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10),
    )
"""


def test_channels_are_priced_on_the_grid_of_their_numeric(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NET)
    sizes = (InputSpec("input", "float32", (2, 3, 8, 8)),)
    asked = request(
        Path(f"{tmp_path}/nets.py:net"),
        *(None, None, tmp_path / "cache"),
        target="orin",
        input_shapes=sizes,
        sequence_length=None,
    )
    found = profile_model(asked, progress=Told())
    entries = json.loads(found.table_path.read_text())["entries"]
    sites = [e for e in entries if not e["signature"].startswith("model")]
    widths = {n: [e["level"]["width"] for e in sites if e["level"]["numeric"] == n] for n in GRID}
    assert all(w % GRID[n] == 0 or w in (16, 40) for n, found in widths.items() for w in found)
    assert all(widths.values())
    kinds = {e["level"]["numeric"] for e in sites if e["level"]["width"]}
    assert kinds == set(GRID)


def test_a_mixture_is_priced_with_every_expert_on_all_tokens(tmp_path: Path) -> None:
    folder = save_family("mixtral", tmp_path / "mixtral")
    asked = request(folder, None, None, tmp_path / "cache", target="a100", sequence_length=8)
    priced = price_model(asked, progress=Told())
    correction = priced.prices.table.correction
    assert correction is not None
    assert correction.median_error < 0.1
    (first, *_) = [s for s in priced.prepared.structure.sites if s.kind == "experts"]
    ms = [priced.prices.sites.alone_ms(first.name, Level(n)) for n in range(2, first.units + 1)]
    assert ms == sorted(ms)
    model = priced.prepared.specialise(priced.prepared.dense, Edit()).to_bytes()
    products = [k for k in kernels_of(model, asked.workload) if isinstance(k, Product)]
    assert {k.rows for k in products} == {8}


def test_dry_run_knows_the_target(run: Run, project: Project) -> None:
    code, out, _ = run(
        *("compile", str(project.model), "--target", "orin:30w", "--speedup", "2x", "--dry-run"),
        *("--data", str(project.data), "-o", str(project.out / "x"), "--format", "json"),
    )
    assert code == 0
    assert json.loads(out)["target"]["sheet"]["multiprocessors"] == 8


def test_runs_of_a_modelled_graph_are_all_the_same(project: Project) -> None:
    device = open_device(load_target("a100"))
    workload = project.manifest.workload
    graphs = [
        device.timer().load((project.out / name).read_bytes(), workload=workload)
        for name in ("reference.onnx", "model.onnx")
    ]
    assert [g.run() for g in graphs] == [g.run() for g in graphs]
    assert graphs[1].run() < graphs[0].run()


def test_a_slower_power_mode_is_slower(project: Project) -> None:
    dense, workload = (project.out / "reference.onnx").read_bytes(), project.manifest.workload
    names = ("orin", "orin:50w", "orin:30w")
    times = [
        open_device(load_target(name)).timer().load(dense, workload=workload).run()
        for name in names
    ]
    assert times == sorted(times)


def test_the_interval_is_wider_for_int8_and_for_what_is_not_anchored(project: Project) -> None:
    dense, workload = (project.out / "reference.onnx").read_bytes(), project.manifest.workload
    doubts = {
        name: open_device(load_target(name)).doubt(dense, workload) for name in ("a100", "h100")
    }
    half = Allocation({"site": Level(32)}, 1.0, 0.0)
    rounded = replace(half, levels={"site": Level(32, "int8-static")})
    widths = []
    for name, allocation in (("a100", half), ("a100", rounded), ("h100", half)):
        doubt = doubts[name]
        assert doubt is not None
        timing = predicted_timing(ModelledGraph(2.0), ModelledGraph(1.0), allocation, doubt)
        low, high = timing.ci95
        assert low < timing.speedup == 2.0 < high
        widths.append(high / low)
    assert widths[0] < widths[1]
    assert widths[0] ** 2 == pytest.approx(widths[2])


@pytest.mark.parametrize(("int8_ms", "offered"), [(0.6, True), (0.7, False), (1.1, False)])
def test_a_numeric_is_offered_only_where_its_gain_is_beyond_doubt(
    int8_ms: float, offered: bool
) -> None:
    prices = prices_by(lambda level: int8_ms if level.numeric == "int8-static" else 1.0)
    prices.doubt = Doubt({"width": 0.1, "int8": math.log(1.5), "2:4": 0.1}, anchored=True)
    assert prices.gains("site", Level(8, "int8-static")) is offered
    assert prices.gains("site", Level(8))
    prices.doubt = None  # measured: the search decides
    assert prices.gains("site", Level(8, "int8-static"))
