"""TensorRT's Python package where there is no trtexec: over a real sshd, with a package that keeps
no time, and with the real parser and builder of TensorRT-RTX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fake_tensorrt, loopback
from tests.relu_graph import WORKLOAD, graph
from zipc.core.errors import EngineFailed, RemoteError
from zipc.exporters.tensorrt.script import recipe
from zipc.profiler import remote, tensorrt_python
from zipc.profiler.remote import Host, RemoteDevice
from zipc.profiler.timing import interleave
from zipc.profiler.trtexec import BY_PYTHON

SCRIPT = str(tensorrt_python.__file__)


pytestmark = pytest.mark.usefixtures("through_loopback")


def board(folder: Path) -> RemoteDevice:
    python = fake_tensorrt.python_beside(folder)
    return RemoteDevice(Host(loopback.ALIAS, python), "tensorrt", recipe)


@pytest.mark.parametrize(("version", "flags"), [("10.13.3.9", 1 << 1), ("11.4.0.1", 0)])
def test_engines_are_built_and_timed_by_the_package(
    tmp_path: Path, version: str, flags: int
) -> None:
    package = fake_tensorrt.install(tmp_path, version=version)
    device = board(tmp_path)
    timer = device.timer()
    graphs = [graph("batch"), graph(2)]
    runners = [timer.load(model, workload=WORKLOAD) for model in graphs]
    fixed = json.loads((package / "built").read_text())
    assert fixed == {"flags": flags, "sparse": ["BuilderFlag.SPARSE_WEIGHTS"], "profiles": []}
    samples = interleave(runners, rounds=50)
    for taken, model in zip(samples, graphs, strict=True):
        assert taken == pytest.approx([len(model) / 1e4] * 50, rel=1e-5)
    assert json.loads((package / "memory").read_text()) == {"x": 24, "y": 24}
    assert json.loads(runners[0].layers()) == {"Layers": [], "Bindings": []}
    prints = device.fingerprint()
    assert prints["runtime_version"] == ".".join(version.split(".")[:3])
    assert prints["tool"] == "TensorRT's Python package"
    assert device.notes == [BY_PYTHON]


def test_open_axes_become_a_profile(tmp_path: Path) -> None:
    package = fake_tensorrt.install(tmp_path)
    board(tmp_path).timer().load(graph("batch"), workload=WORKLOAD)
    built = json.loads((package / "built").read_text())
    assert built["profiles"] == [{"x": [[1, 3], [2, 3], [2, 3]]}]


def test_an_engine_that_cannot_be_captured_is_timed_with_its_launches(tmp_path: Path) -> None:
    fake_tensorrt.install(tmp_path, trouble="not captured")
    device = board(tmp_path)
    runner = device.timer().load(graph(), workload=WORKLOAD)
    interleave([runner], rounds=4)
    assert any("cannot be captured as a CUDA graph" in note for note in device.notes)


@pytest.mark.parametrize(
    ("trouble", "error", "told"),
    [
        ("refused", EngineFailed, r"TensorRT 10\.13\.3 refuses.*Tile /Tile: /OneHot cannot"),
        ("no gpu", RemoteError, "finds no GPU it can use .*CUDA initialization failure"),
    ],
)
def test_failures_say_what_they_are(
    tmp_path: Path, trouble: str, error: type[Exception], told: str
) -> None:
    fake_tensorrt.install(tmp_path, trouble=trouble)
    with pytest.raises(error, match=told):
        board(tmp_path).timer().load(graph(), workload=WORKLOAD)


def test_flags_that_are_not_known_are_refused(tmp_path: Path) -> None:
    fake_tensorrt.install(tmp_path)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--onnx=x", "--buildDLA"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "[E] Unknown option: --buildDLA" in done.stdout


def test_the_calls_that_build_are_those_of_nvidias_own_package(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    fake_tensorrt.over_rtx(tmp_path)
    (tmp_path / "model.onnx").write_bytes(graph("batch"))
    sizes = {"min": "x:1x3", "opt": "x:2x3", "max": "x:2x3"}
    done = subprocess.run(
        [
            *(sys.executable, SCRIPT),
            f"--onnx={tmp_path / 'model.onnx'}",
            f"--saveEngine={tmp_path / 'made.engine'}",
            f"--exportLayerInfo={tmp_path / 'layers.json'}",
            *("--stronglyTyped", "--sparsity=enable", "--skipInference"),
            *(f"--{end}Shapes={text}" for end, text in sizes.items()),
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED TensorRT.trtexec [TensorRT v101300]" in done.stdout
    assert (tmp_path / "made.engine").stat().st_size > 0


def test_this_machine_is_a_board_without_ssh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIPC_SSH", "false")
    fake_tensorrt.install(tmp_path)
    device = RemoteDevice(
        Host(remote.LOCAL, fake_tensorrt.python_beside(tmp_path)), "tensorrt", recipe
    )
    runner = device.timer().load(graph(), workload=WORKLOAD)
    assert runner.run() == pytest.approx(len(graph()) / 1e4, rel=1e-5)
    assert device.fingerprint()["host"] == remote.LOCAL
    with pytest.raises(RemoteError, match="there is no python9"):
        RemoteDevice(Host(remote.LOCAL, "python9"), "tensorrt", recipe).timer()
