"""`--runtime openvino` and `auto`: from the request to OUT, its gate and its bench."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import zipc.turns as turns
from tests.tiny_project import (
    Told,
    request,
)
from zipc import load
from zipc.bench import bench
from zipc.build import INT8_BOUND
from zipc.core.errors import CorruptFile, UsageError
from zipc.core.files import read_json, write_json
from zipc.core.request import Request
from zipc.core.types import Workload
from zipc.gate import check
from zipc.latency_tables.store import TableStore
from zipc.manifest import Manifest
from zipc.numerics.bf16 import BF16, Bf16Linear
from zipc.numerics.int4 import INT4
from zipc.numerics.int8 import DYNAMIC, STATIC
from zipc.pipeline import compile_model
from zipc.predict import onnx_predict
from zipc.profiler.agent import PRECISION
from zipc.profiler.facts import fingerprint
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.profiler.runners.openvino import OpenVinoRunner, narrow_products
from zipc.profiling import profile_model
from zipc.targets import load_target, on_device, requested_target

pytest.importorskip("openvino", reason="OpenVINO is not installed")


pytestmark = pytest.mark.usefixtures("exact_times")


@pytest.fixture(scope="module")
def parts(sources: tuple[Path, Path]) -> tuple[Path, Path, Path]:
    """A model, data and a cache."""
    return *sources, sources[0].with_name("cache")


@pytest.fixture(scope="module")
def integers(
    parts: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """The model in INT8 for OpenVINO, unpruned."""
    model, data, cache = parts
    out = tmp_path_factory.mktemp("out") / "int8"
    asked = request(
        model, data, out, cache, runtime="openvino", numerics="int8", prune=False, speedup=None
    )
    return out, compile_model(asked, progress=Told())


def test_every_product_of_an_int8_compile_runs_on_integers(
    integers: tuple[Path, Manifest],
) -> None:
    out, manifest = integers
    assert {record.level.numeric for record in manifest.allocation} == {STATIC}
    linear = 2 * 6  # query, key, value, output and the two of the FFN, in two layers
    assert narrow_products(out / "model.onnx")["int8"] >= linear
    assert narrow_products(out / "reference.onnx")["int8"] == 0
    ops = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= ops
    assert not {"MatMulInteger", "Attention"} & ops


def test_the_manifest_says_what_it_was_made_and_measured_under(
    integers: tuple[Path, Manifest],
) -> None:
    _, manifest = integers
    assert manifest.runtime == manifest.latency.fingerprint["runtime"] == "openvino"
    assert manifest.latency.session_options[PRECISION] == "f32"
    assert manifest.latency.session_options["INFERENCE_NUM_THREADS"] == 1
    assert "openvino" in manifest.versions


def test_what_ships_says_the_same_in_both_runtimes(integers: tuple[Path, Manifest]) -> None:
    out, _ = integers
    ids = np.array([[2, 9, 14, 20, 3], [2, 11, 3, 0, 0]], dtype=np.int64)
    feeds = {
        "input_ids": ids,
        "attention_mask": (ids != 0).astype(np.int64),
        "token_type_ids": np.zeros_like(ids),
    }
    for name, bound in (("reference.onnx", 1e-4), ("model.onnx", INT8_BOUND)):
        names = ["last_hidden_state"]
        mine, theirs = (
            onnx_predict(out / name, names, runtime=runtime)(feeds)[names[0]]
            for runtime in ("openvino", "onnxruntime")
        )
        kept = ids != 0
        gap = np.linalg.norm((mine - theirs)[kept]) / np.linalg.norm(theirs[kept])
        assert gap < bound


@pytest.mark.skipif(
    not any("bf16" in feature for feature in fingerprint("openvino")["isa"]),
    reason="this processor has no instructions for bf16",
)
def test_every_product_of_a_bf16_compile_runs_in_bf16(
    parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, data, cache = parts
    asked = request(
        *(model, data, tmp_path / "out", cache),
        runtime="openvino",
        numerics=BF16,
        prune=False,
        speedup=None,
    )
    manifest = compile_model(asked, progress=Told())
    assert {record.level.numeric for record in manifest.allocation} == {BF16}
    assert narrow_products(tmp_path / "out" / "model.onnx")["bf16"] == 2 * 6
    assert narrow_products(tmp_path / "out" / "reference.onnx")["bf16"] == 0
    loaded = load(tmp_path / "out")
    assert sum(isinstance(m, Bf16Linear) for m in loaded.modules()) == 2 * 6
    ids = torch.tensor([[2, 9, 14, 20, 3]])
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    feeds["token_type_ids"] = torch.zeros_like(ids)
    name = "last_hidden_state"
    predict = onnx_predict(tmp_path / "out" / "model.onnx", [name], runtime="openvino")
    mine = predict({k: v.numpy() for k, v in feeds.items()})[name]
    with torch.no_grad():
        theirs = loaded(**feeds)[name].numpy()
    assert np.linalg.norm(mine - theirs) < 0.01 * np.linalg.norm(theirs)


def test_bench_and_check_follow_the_manifest(
    integers: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = integers
    assert bench(out, pairs=20).session_options["device"] == "CPU"
    opened: list[str] = []
    run = OpenVinoRunner.run
    monkeypatch.setattr(OpenVinoRunner, "run", lambda self: opened.append("ov") or run(self))
    monkeypatch.setattr(OnnxRuntimeRunner, "run", lambda self: opened.append("ort") or run(self))
    assert check(out / "model.onnx", out, max_time_s=1).status == "pass"
    assert set(opened) == {"ov"}
    strange = tmp_path / "strange"
    shutil.copytree(out, strange)
    document = read_json(strange / "manifest.json", advice="")
    write_json(strange / "manifest.json", document | {"runtime": "abacus"})
    with pytest.raises(CorruptFile, match="abacus"):
        bench(strange)
    with pytest.raises(CorruptFile, match="runtime"):
        Manifest.read(strange)


def test_tables_of_two_runtimes_do_not_mix(parts: tuple[Path, Path, Path]) -> None:
    model, _, cache = parts
    made = {
        runtime: profile_model(request(model, None, None, cache, runtime=runtime), progress=Told())
        for runtime in ("openvino", None)
    }
    paths = [result.table_path for result in made.values()]
    assert paths[0] != paths[1]
    tables = [TableStore(cache).load(path) for path in paths]
    assert [t.runtime for t in tables if t is not None] == ["openvino", "onnxruntime"]
    numerics = [{e.level.numeric for e in t.entries} for t in tables if t is not None]
    assert numerics[1] - numerics[0] == {"int8-dynamic"}


@pytest.mark.parametrize("faster", ["openvino", "onnxruntime"])
def test_auto_takes_the_faster_and_says_so(
    parts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    class Timer:
        def __init__(self, runtime: str) -> None:
            self.ms = 1.0 if runtime == faster else 2.0

        def load(self, _: bytes, *, workload: Workload) -> Any:
            return self

        def run(self) -> float:
            return self.ms

    opened = turns.open_device

    def device(target: Any, *rest: Any, **named: Any) -> Any:
        made = opened(target, *rest, **named)
        fake = type("Fake", (type(made),), {"timer": lambda self: Timer(self.runtime)})
        return fake(made.runtime)

    monkeypatch.setattr(turns, "open_device", device)
    told = Told()
    target, _, note = turns.faster_runtime(
        prepared_of(parts), request(parts[0], None, None, parts[2]), load_target("cpu"), told
    )
    assert target.runtime == faster
    assert note.startswith(f"runtime {faster}, the faster one on the dense model")
    assert "ONNX Runtime" in note
    assert "OpenVINO" in note


def prepared_of(parts: tuple[Path, Path, Path]) -> Any:
    from zipc.model_source import load_source, settle
    from zipc.prepare import prepare
    from zipc.stage_cache import StageCache

    source = load_source(str(parts[0]), weights=None, input_shapes=())
    asked = settle(request(parts[0], None, None, parts[2]), source)
    return prepare(source, asked, cache=StageCache(parts[2]), progress=Told())


def test_a_runtime_has_the_numerics_it_has_kernels_for() -> None:
    cpu = load_target("cpu")
    decode = {"model": "m", "phase": "decode"}
    assert requested_target(Request(**decode)).numerics == ("fp32", DYNAMIC, STATIC, INT4)
    assert requested_target(Request(model="m")).numerics == ("fp32", DYNAMIC, STATIC)
    mine = requested_target(Request(model="m", runtime="openvino"))
    assert (mine.runtime, mine.numerics) == ("openvino", ("fp32", BF16, STATIC))
    assert requested_target(Request(**decode, runtime="auto")) == cpu


def test_a_processor_without_bf16_is_not_offered_it() -> None:
    target = requested_target(Request(model="m", runtime="openvino"))
    assert on_device(target, {"isa": ["avx2", "avx512_vnni"]}).numerics == ("fp32", STATIC)
    assert on_device(target, {"isa": ["avx512_bf16"]}) == target
    assert on_device(target, {}) == target


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"runtime": "openvino", "numerics": "int8-dynamic"}, "int8-static"),
        ({"runtime": "auto", "numerics": "int8-dynamic"}, "under openvino"),
        ({"numerics": "bf16"}, "under onnxruntime.*give --runtime openvino"),
        ({"runtime": "openvino", "target": "a100"}, "--target cpu"),
        ({"runtime": "auto", "target": "a100"}, "--target cpu"),
        ({"runtime": "openvino", "layout": "triton"}, "--runtime onnxruntime"),
        ({"runtime": "tvm"}, "onnxruntime, openvino, torch, auto"),
    ],
)
def test_what_a_runtime_cannot_do_is_refused_at_once(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        requested_target(Request(model="m", **asked))


@pytest.mark.parametrize("runtime", ["openvino", "auto"])
def test_without_openvino_the_extra_is_named(
    parts: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name)
    )
    with pytest.raises(UsageError, match=r"pip install 'zipc\[openvino\]'"):
        profile_model(request(parts[0], None, None, parts[2], runtime=runtime), progress=Told())
