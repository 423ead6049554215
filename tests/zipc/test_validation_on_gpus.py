"""What was predicted for a GPU, measured on it: a real sshd, and a trtexec that only pretends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import fake_trtexec, loopback
from tests.command_line import Run
from tests.zipc.test_cli import manifest
from tests.zipc.test_validation import finished, snapshot
from zipc.core.types import Artifact
from zipc.manifest import Manifest, RequestRecord

NOTE = "Latencies by a roofline model fitted to published figures; nothing was measured"


@pytest.fixture(autouse=True)
def through_loopback(server: loopback.Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPC_SSH", server.command)


def predicted(out: Path, *, asked: float) -> Manifest:
    """A finished compile for a GPU that was not at hand."""
    times = ("reference_ms", "compiled_ms", "p90_ms", "p99_ms", "pairs", "prediction_error")
    nothing = {**dict.fromkeys(times), "fingerprint": {"fp16_tflops": 42.6}, "notes": (NOTE,)}
    latency = manifest().latency.model_copy(update={"table_kind": "modelled", **nothing})
    request = RequestRecord(model="minilm", speedup=asked)
    made = finished(out, latency=latency, verdict="predicted", target="orin", request=request)
    files = tuple(Artifact(f.path, "model", f.sha256) for f in made.files)
    made = made.model_copy(update={"files": files})
    made.write(out)
    return made


def test_a_predicted_verdict_becomes_a_measured_one(tmp_path: Path, run: Run) -> None:
    fake_trtexec.install(tmp_path)
    board = ("--host", loopback.ALIAS, "--host-python", fake_trtexec.python_beside(tmp_path))
    out = tmp_path / "out"
    before = predicted(out, asked=1.9)
    code, told, _ = run("bench", str(out), *board, "--format", "json")
    assert code == 0
    assert json.loads(told)["device"]["runtime_version"] == "10.3.0"
    assert Manifest.read(out) == before
    assert run("validate", str(out), *board)[0] == 0
    made = Manifest.read(out)
    assert made.verdict == "validated"
    sizes = [(out / name).stat().st_size for name in ("reference.onnx", "model.onnx")]
    assert made.latency.speedup == pytest.approx(sizes[0] / sizes[1], rel=0.01)
    assert made.latency.reference_ms == pytest.approx(sizes[0] / 1e4, rel=0.01)
    measured, foretold = made.latency.speedup, before.latency.speedup
    assert made.latency.prediction_error == pytest.approx(measured / (foretold or 0) - 1)
    assert made.latency.fingerprint["host"] == loopback.ALIAS
    assert "without transfers" in str(made.latency.session_options["trtexec"])
    assert any("target 'orin' by its model" in note for note in made.latency.notes)
    assert made.changed_files(out) == []
    kinds = {f.kind for f in made.files if f.path.endswith(".onnx")}
    assert kinds == {"model (timed)", "dense reference (timed)"}
    assert not any("nothing was measured" in note for note in made.latency.notes)
    for verb in (["bench"], ["validate"], ["check", "--baseline", str(out)]):
        code, _, err = run(*verb, str(out))
        assert code == 2
        assert "target 'orin', which is not this machine" in err


def test_luck_of_the_build_is_told_and_widens_the_interval(tmp_path: Path, run: Run) -> None:
    calls = fake_trtexec.install(tmp_path, trouble="luck")
    board = ("--host", loopback.ALIAS, "--host-python", fake_trtexec.python_beside(tmp_path))
    out = tmp_path / "out"
    predicted(out, asked=25)
    code, told, _ = run("validate", str(out), *board, "--builds", "3", "--format", "json")
    built = [w for w in map(json.loads, calls.read_text().splitlines()) if "--skipInference" in w]
    assert len(built) == 6
    assert not any("timingCacheFile" in word for words in built for word in words)
    latency = Manifest.read(out).latency
    assert latency.speedup_ci95 is not None
    low, high = latency.speedup_ci95
    assert high / low > 1.1
    assert any(note.startswith("3 builds: ") for note in latency.notes)
    assert low < 25 < (latency.speedup or 0) < high
    assert (code, json.loads(told)["verdict"]) == (3, "inconclusive")
    run("validate", str(out), *board)
    assert not any("3 builds" in note for note in Manifest.read(out).latency.notes)


@pytest.mark.parametrize(("builds", "told"), [("0", "once or more"), ("3", "of TensorRT")])
def test_only_engines_are_built_more_than_once(
    tmp_path: Path, run: Run, builds: str, told: str
) -> None:
    finished(tmp_path / "out")
    code, _, err = run("bench", str(tmp_path / "out"), "--builds", builds)
    assert code == 2
    assert f"--builds {builds}: engines" in err
    assert told in err


def test_a_promise_that_is_not_kept_is_missed(tmp_path: Path, run: Run) -> None:
    fake_trtexec.install(tmp_path, major="11")
    board = ("--host", loopback.ALIAS, "--host-python", fake_trtexec.python_beside(tmp_path))
    predicted(tmp_path / "out", asked=100.0)
    assert run("validate", str(tmp_path / "out"), *board)[0] == 1
    assert Manifest.read(tmp_path / "out").verdict == "missed"


def test_a_board_that_refuses_the_graph_changes_nothing(tmp_path: Path, run: Run) -> None:
    fake_trtexec.install(tmp_path, major="11", trouble="refused")
    board = ("--host", loopback.ALIAS, "--host-python", fake_trtexec.python_beside(tmp_path))
    predicted(tmp_path / "out", asked=1.9)
    before = snapshot(tmp_path / "out")
    code, _, err = run("validate", str(tmp_path / "out"), *board)
    assert code == 2
    assert "TensorRT 11.4.0 refuses the graph" in err
    assert snapshot(tmp_path / "out") == before
