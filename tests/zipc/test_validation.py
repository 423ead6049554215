"""`zipc validate`: what is measured again is what the manifest then says, or nothing changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Run
from tests.zipc.test_cli import manifest
from tests.zipc.test_proof import Fake, Scripted, _matmul
from zipc.bench import bench
from zipc.core.errors import CorruptFile, NoisyMeasurement, UsageError
from zipc.core.files import sha256_file
from zipc.core.types import Artifact, Workload
from zipc.manifest import Manifest, RequestRecord
from zipc.profiler.device import LocalDevice
from zipc.profiler.facts import machine
from zipc.validation import OF_THE_COMPILE, validate


def finished(out: Path, **changes: Any) -> Manifest:
    """An output folder with two graphs, one twice as fast on `Scripted`, and a file of the user."""
    out.mkdir()
    for name, width in (("reference.onnx", 2048), ("model.onnx", 64)):
        _matmul(out / name, width)
    (out / "mine.txt").write_text("kept")
    files = tuple(Artifact(n, n, sha256_file(out / n)) for n in ("model.onnx", "reference.onnx"))
    latency = manifest().latency.model_copy(
        update={
            "notes": ("200 pairs in 10 batches of 20", "of the table"),
            "prediction_error": 0.1,
            "fingerprint": LocalDevice("onnxruntime").fingerprint(),
        }
    )
    made = manifest(files=files, workload=Workload(1, 128), latency=latency)
    made = made.model_copy(update=changes)
    made.write(out)
    return made


class Broken(Scripted):
    def load(self, model: bytes, **_: object) -> Fake:
        raise NoisyMeasurement("the clock went backwards")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("asked", "verdict"), [(1.9, "validated"), (2.2, "missed")])
def test_verdict_times_and_samples_are_those_of_the_new_measurement(
    tmp_path: Path, asked: float, verdict: str
) -> None:
    out = tmp_path / "out"
    request = RequestRecord(model="minilm", speedup=asked)
    before = finished(out, request=request, verdict="inconclusive")
    made = validate(out, device=Scripted("onnxruntime"), pairs=96)
    assert made == Manifest.read(out)
    assert made.verdict == verdict
    assert made.latency.speedup == pytest.approx(2.0, rel=0.02)
    assert (made.latency.pairs, made.latency.compiled_ms) == (96, pytest.approx(10, rel=0.02))
    assert made.latency.prediction_error == pytest.approx(1.1 * 2.0 / 2.04 - 1, abs=0.02)
    assert made.latency.fingerprint == LocalDevice("onnxruntime").fingerprint()
    assert made.changed_files(out) == []
    samples = json.loads((out / "samples.json").read_text())
    assert len(samples["reference_ms"]) == len(samples["compiled_ms"]) == 96
    notes = made.latency.notes
    assert "of the table" in notes
    assert "validated again on this machine; before: 2.040x, measured" in notes
    assert not any(note.startswith(OF_THE_COMPILE) for note in notes)
    assert not any(note.startswith("200 pairs") for note in notes)
    assert made.quality == before.quality
    assert (out / "mine.txt").read_text() == "kept"


def test_twice_is_told_once(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    for _ in range(2):
        made = validate(tmp_path / "out", device=Scripted("onnxruntime"), pairs=60)
    assert sum(note.startswith("validated again") for note in made.latency.notes) == 1
    assert sum(f.path == "samples.json" for f in made.files) == 1
    assert {"before", "after"} == json.loads((tmp_path / "out/samples.json").read_text())[
        "state"
    ].keys()


def test_prices_of_another_device_are_said_to_be_that_until_the_next_compile(
    tmp_path: Path,
) -> None:
    made = finished(tmp_path / "out")
    elsewhere = {"fingerprint": {"runtime": "onnxruntime", "host": "board", "machine": "another"}}
    latency = made.latency.model_copy(update=elsewhere)
    made.model_copy(update={"latency": latency}).write(tmp_path / "out")
    for _ in range(2):
        made = validate(tmp_path / "out", device=Scripted("onnxruntime"), pairs=60)
        assert made.latency.prediction_error is None
        assert [n for n in made.latency.notes if "prices" in n] == [f"{OF_THE_COMPILE}board"]


def test_what_was_measured_on_a_board_is_not_timed_here_before_it_is_validated_here(
    tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    made = finished(out)
    prints = {"runtime": "onnxruntime", "host": "board", "machine": "another"}
    latency = made.latency.model_copy(update={"fingerprint": prints})
    made.model_copy(update={"latency": latency}).write(out)
    for verb in (("bench", str(out)), ("check", str(out), "--baseline", str(out))):
        code, _, err = run(*verb)
        assert code == 2
        assert f"zipc bench {out} --host board" in err
        assert f"zipc validate {out}" in err
    validate(out, device=Scripted("onnxruntime"), pairs=60)
    assert bench(out, device=Scripted("onnxruntime"), pairs=60).holds
    prints["machine"] = machine()
    made.model_copy(update={"latency": latency}).write(out)
    assert bench(out, device=Scripted("onnxruntime"), pairs=60).holds


def test_a_measurement_that_fails_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(out)
    before = snapshot(tmp_path)
    with pytest.raises(NoisyMeasurement):
        validate(out, device=Broken("onnxruntime"), pairs=60)
    assert snapshot(tmp_path) == before


def test_graphs_that_are_not_those_of_the_compile_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(out)
    _matmul(out / "model.onnx", 32)
    with pytest.raises(CorruptFile, match=r"model\.onnx changed"):
        validate(out, device=Scripted("onnxruntime"), pairs=60)


def test_what_was_made_for_a_gpu_is_not_timed_on_a_cpu(tmp_path: Path) -> None:
    modelled = manifest().latency.model_copy(update={"table_kind": "modelled"})
    finished(tmp_path / "out", latency=modelled, verdict="predicted", target="a100")
    with pytest.raises(UsageError, match=r"build\.sh"):
        validate(tmp_path / "out", device=Scripted("onnxruntime"), pairs=60)


def test_the_exit_code_is_that_of_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(LocalDevice, "timer", Scripted.timer)
    monkeypatch.setattr(LocalDevice, "load", Scripted.load, raising=False)
    for asked, code in ((1.9, 0), (2.2, 1)):
        out = tmp_path / f"out{code}"
        finished(out, request=RequestRecord(model="minilm", speedup=asked))
        found, told, _ = run("validate", str(out), "--format", "json")
        assert found == code
        assert json.loads(told)["latency"]["speedup"] == pytest.approx(2.0, rel=0.02)
        found, told, _ = run("validate", str(out))
        assert (found, "asked 1.9x" in told) == (code, code == 0)
