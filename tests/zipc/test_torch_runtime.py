"""`--runtime torch` and the target `cuda`: from the request to OUT, its bench, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_project import Told, request
from zipc.bench import bench
from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.devices import device_of, open_device
from zipc.manifest import Manifest
from zipc.pipeline import compile_model
from zipc.predict import onnx_predict
from zipc.profiler.fingerprint import device_fingerprint
from zipc.profiler.runners.torch import TorchCudaRunner
from zipc.targets import load_target, requested_target

pytestmark = pytest.mark.usefixtures("exact_times")


@pytest.fixture(scope="module")
def compiled(
    sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """A model pruned to 1.2x for torch on this processor."""
    out = tmp_path_factory.mktemp("out") / "torch"
    cache = sources[0].with_name("cache")
    asked = request(*sources, out, cache, runtime="torch", speedup=1.2)
    return out, compile_model(asked, progress=Told())


def test_a_compile_is_priced_proved_and_read_in_torch(compiled: tuple[Path, Manifest]) -> None:
    out, manifest = compiled
    assert manifest.runtime == manifest.latency.fingerprint["runtime"] == "torch"
    assert manifest.latency.fingerprint["runtime_version"] == str(torch.__version__)
    assert manifest.latency.session_options == {"device": "cpu", "threads": 1}
    assert {record.level.numeric for record in manifest.allocation} == {"fp32"}
    assert manifest.quality is not None
    assert bench(out, pairs=20).session_options["device"] == "cpu"


def test_what_ships_is_the_same_in_onnx_runtime(compiled: tuple[Path, Manifest]) -> None:
    ids = np.array([[2, 9, 14, 20, 3], [2, 11, 3, 0, 0]], dtype=np.int64)
    feeds = {
        "input_ids": ids,
        "attention_mask": (ids != 0).astype(np.int64),
        "token_type_ids": np.zeros_like(ids),
    }
    name = "last_hidden_state"
    mine, theirs = (
        onnx_predict(compiled[0] / "model.onnx", [name], runtime=runtime)(feeds)[name]
        for runtime in ("torch", "onnxruntime")
    )
    assert np.linalg.norm((mine - theirs)[ids != 0]) < 1e-4 * np.linalg.norm(theirs[ids != 0])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"numerics": "int8-static"}, "under torch"),
        ({"layout": "triton"}, "--runtime onnxruntime"),
        ({"target": "a100"}, "--target cpu"),
        ({"pattern": "2:4"}, "kernels of torch multiply zeros"),
    ],
)
def test_what_torch_has_no_kernels_for_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        requested_target(Request(model="m", runtime="torch", **asked))


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch", "auto"])
def test_a_gpu_has_no_runtime_of_processors(runtime: str) -> None:
    with pytest.raises(UsageError, match=r"target 'cuda' runs torch-cuda.*--target cpu"):
        requested_target(Request(model="m", target="cuda", runtime=runtime))


def test_boards_are_not_timed_in_torch(compiled: tuple[Path, Manifest]) -> None:
    target = requested_target(Request(model="m", runtime="torch"))
    with pytest.raises(UsageError, match="this machine only"):
        open_device(target, "user@board")
    with pytest.raises(UsageError, match="this machine only"):
        device_of(compiled[0], host="user@board")


def test_the_gpu_of_this_machine_is_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    target = load_target("cuda")
    assert requested_target(Request(model="m", target="cuda")) == target
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no NVIDIA GPU here"):
        open_device(target)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert open_device(target).runtime == TorchCudaRunner.runtime
    assert device_fingerprint(runtime="torch-cuda")["runtime_version"] == str(torch.__version__)


def test_a_compile_for_a_gpu_takes_the_same_way(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs run on the processor here: what only a GPU shows is tested where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        TorchCudaRunner, "options", staticmethod(lambda _: {"device": "cpu", "threads": 1})
    )
    out, cache = tmp_path / "out", sources[0].with_name("cache")
    asked = request(*sources, out, cache, target="cuda", speedup=1.2)
    manifest = compile_model(asked, progress=Told())
    assert (manifest.target, manifest.runtime) == ("cuda", "torch-cuda")
    assert manifest.latency.by_default is None
    assert Manifest.read(out).verdict == manifest.verdict
