"""Compiles that are measured on a board: a real sshd on loopback, real graphs, real times."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import fake_trtexec, loopback
from tests.command_line import Run
from tests.tiny_project import Told, request, small_effort
from zipc import pricing
from zipc.cli.flags import read_hosts
from zipc.core.errors import EngineFailed, RemoteError, UsageError
from zipc.core.request import Request
from zipc.effort import EFFORTS
from zipc.latency_tables.store import read_table
from zipc.manifest import Manifest
from zipc.pipeline import compile_model
from zipc.profiler import remote
from zipc.profiler.device import LocalDevice
from zipc.profiling import profile_model


@pytest.fixture(autouse=True)
def over_there(server: loopback.Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: LocalDevice) -> None:
        raise AssertionError("something was timed on this machine")

    monkeypatch.setenv("ZIPC_SSH", server.command)
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setattr(LocalDevice, "timer", refuse)
    monkeypatch.setattr(pricing, "TRUSTED_ERROR", math.inf)  # of a network of microseconds
    monkeypatch.setattr(remote, "LASTING_S", math.inf)
    monkeypatch.setattr(pricing, "ALONE", replace(pricing.ALONE, rounds=6))
    monkeypatch.setattr(pricing, "PLACE_ROUNDS", (6, 6))
    small_effort(monkeypatch)
    monkeypatch.setitem(EFFORTS, "quick", replace(EFFORTS["quick"], verdict_pairs=60))


class CutOff(Told):
    """Cuts something off once the first prices are there."""

    def __init__(self, cut: Any) -> None:
        super().__init__()
        self.cut = cut

    def advance(self, steps: int = 1, note: str = "") -> None:
        if self._name == "measuring prices" and self.cut is not None:
            cut, self.cut = self.cut, None
            cut()


def asked(sources: tuple[Path, Path], tmp_path: Path, **rest: Any) -> Request:
    board = {"host": loopback.ALIAS, "host_python": sys.executable, "speedup": 1.2}
    return request(*sources, tmp_path / "out", tmp_path / "cache", **(board | rest))


def test_a_compile_is_measured_on_the_board_through_a_lost_connection(
    sources: tuple[Path, Path], tmp_path: Path, server: loopback.Sshd
) -> None:
    progress = CutOff(server.drop_connections)
    manifest = compile_model(asked(sources, tmp_path), progress=progress)
    out = tmp_path / "out"
    assert Manifest.read(out) == manifest
    assert manifest.verdict in ("validated", "inconclusive", "missed")
    assert manifest.latency.table_kind == "measured"
    assert manifest.latency.fingerprint["host"] == "board"
    assert manifest.request.model_dump()["host"] == "board"
    assert sum("lost and taken up again" in note for note in manifest.latency.notes) == 1
    free = manifest.latency.by_default
    assert free is None or (free.promised and free.processors > 1)
    assert json.loads((out / "samples.json").read_text())["compiled_ms"]


def test_the_table_of_a_board_serves_that_board_alone(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    first = profile_model(asked(sources, tmp_path), progress=Told())
    again = profile_model(asked(sources, tmp_path), progress=Told())
    other = profile_model(asked(sources, tmp_path, host=loopback.OTHER), progress=Told())
    assert (first.from_cache, again.from_cache, other.from_cache) == (False, True, False)
    assert first.table_path == again.table_path != other.table_path
    assert first.table_path.parts[-3] == "cpu@board"
    assert read_table(other.table_path).fingerprint["host"] == "board-2"


def test_boards_are_profiled_at_once_and_one_that_fails_stops_no_other(
    sources: tuple[Path, Path], tmp_path: Path, run: Run
) -> None:
    inventory = tmp_path / "boards"
    inventory.write_text(
        f"# of the lab\n{loopback.OTHER} {sys.executable}  # by another name\n\n"
        "no-such-board.invalid\n"
    )
    code, out, err = run(
        *("profile", str(sources[0]), "--sequence-length", "16", "--effort", "quick"),
        *("--host", loopback.ALIAS, "--host-python", sys.executable, "--hosts", str(inventory)),
        *("--cache-dir", str(tmp_path / "cache"), "--format", "json"),
    )
    assert code == 2
    first, second, lost = json.loads(out)["hosts"]
    assert [h["host"] for h in (first, second)] == [loopback.ALIAS, loopback.OTHER]
    for found in (first, second):
        assert f"cpu@{found['host']}" in found["table_path"]
        assert read_table(Path(found["table_path"])).fingerprint["host"] == found["host"]
        assert f"{found['host']}: measuring prices" in err
    assert lost["host"] == "no-such-board.invalid"
    assert "there is no such host" in lost["error"]["message"]
    assert err.count("trace ...") == 1


def test_boards_none_of_which_is_reached_load_no_model(tmp_path: Path, run: Run) -> None:
    hosts = ("no-such-board.invalid", "nor-this.invalid")
    code, out, _ = run(
        "profile", str(tmp_path / "none"), *(w for h in hosts for w in ("--host", h))
    )
    assert code == 2
    for host in hosts:
        assert f"{host}: failed: there is no such host" in out


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        (("compile", "minilm", "--speedup", "2x", "--data", "d", "-o", "OUT"), "several boards"),
        (("bench", "OUT"), "several boards"),
        (("profile", "minilm", "--host", "b"), "Board b is named twice"),
    ],
)
def test_a_verb_for_one_board_says_so(verb: tuple[str, ...], told: str, run: Run) -> None:
    code, _, err = run(*verb, "--host", "a", "--host", "b")
    assert code == 2
    assert told in err


@pytest.mark.parametrize("text", ["", "# nobody", "a b c", None])
def test_an_inventory_that_names_no_board_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "boards"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match="--hosts"):
        read_hosts(path, python="python3")


def test_a_board_that_vanishes_costs_nothing_that_was_measured(
    sources: tuple[Path, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    server: loopback.Sshd,
) -> None:
    doomed = loopback.start(tmp_path_factory.mktemp("doomed"))
    monkeypatch.setenv("ZIPC_SSH", doomed.command)
    with pytest.raises(RemoteError, match="nothing answers"):
        profile_model(asked(sources, tmp_path), progress=CutOff(doomed.vanish))
    monkeypatch.setenv("ZIPC_SSH", server.command)  # the same board, switched on again
    told = Told()
    result = profile_model(asked(sources, tmp_path), progress=told)
    reused = [int(line.split()[0]) for line in told.infos if "prices reused" in line]
    assert reused
    assert 0 < reused[0] < result.entries


def test_threads_are_those_of_the_board(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="processors of board"):
        profile_model(asked(sources, tmp_path, threads=100_000), progress=Told())


def test_an_unknown_board_ends_before_anything_is_loaded(tmp_path: Path, run: Run) -> None:
    code, _, err = run("profile", str(tmp_path / "none"), "--host", "no-such-board.invalid")
    assert code == 2
    assert "there is no such host" in err


def test_doctor_looks_at_a_board(tmp_path: Path, run: Run) -> None:
    fake_trtexec.install(tmp_path, major="11")
    board = ("--host", loopback.ALIAS, "--host-python", fake_trtexec.python_beside(tmp_path))
    code, out, _ = run("doctor", "--target", "orin", *board, "--format", "json")
    assert code == 0
    there = {f["name"]: f for f in json.loads(out)["findings"]}
    assert there["board: trtexec"]["detail"] == "11.4.0"
    assert f"GB free at {tmp_path}" in there["board: disk"]["detail"]
    assert there["board: load_average"]["status"] == "ok"
    (tmp_path / "trtexec").unlink()
    code, out, _ = run("doctor", "--target", "orin", *board, "--format", "json")
    assert (code, json.loads(out)["ok"]) == (2, False)
    code, out, _ = run("doctor", *board, "--format", "json")
    there = {f["name"]: f for f in json.loads(out)["findings"]}
    assert (code, there["board: trtexec"]["status"]) == (2, "optional")
    missing = there["board: onnxruntime"]
    assert (missing["status"], "pip install onnxruntime" in missing["detail"]) == ("broken", True)
    code, out, _ = run("doctor", "--host", "no-such-board.invalid")
    assert (code, "there is no such host" in " ".join(out.split())) == (2, True)


def test_a_temporary_folder_that_is_none_is_told_as_that(tmp_path: Path, run: Run) -> None:
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nTMPDIR=/no/such exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    board = ("--host", loopback.ALIAS, "--host-python", str(python))
    code, out, _ = run("doctor", *board, "--format", "json")
    there = {f["name"]: f for f in json.loads(out)["findings"]}
    assert (code, there["board: disk"]["status"]) == (2, "broken")
    assert "There is no folder /no/such" in there["board: disk"]["detail"]


@pytest.mark.parametrize(
    "verb",
    [
        ("profile", "m"),
        ("plan", "m", "--speedup", "2x", "--data", "d"),
        ("bench", "o"),
        ("validate", "o"),
        ("doctor",),
    ],
)
def test_a_python_of_no_board_is_refused(verb: tuple[str, ...], run: Run) -> None:
    code, _, err = run(*verb, "--host-python", "/opt/python3")
    assert (code, "name that with --host" in err) == (2, True), err


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"
)
def test_a_board_runs_openvino(sources: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    rest = {"runtime": "openvino", "numerics": "int8", "prune": False, "speedup": None}
    manifest = compile_model(asked(sources, tmp_path, **rest), progress=Told())
    prints = manifest.latency.fingerprint
    assert (manifest.runtime, prints["runtime"], prints["host"]) == (
        "openvino",
        "openvino",
        "board",
    )
    assert prints["runtime_version"] == importlib.metadata.version("openvino")
    assert {a.level.numeric for a in manifest.allocation} == {"int8-static"}
    code, out, _ = run(
        *("doctor", "--host", loopback.ALIAS, "--host-python", sys.executable),
        *("--format", "json"),
    )
    there = {f["name"]: f for f in json.loads(out)["findings"]}
    assert (code, there["board: openvino"]["status"]) == (0, "ok")


def test_a_compile_is_measured_by_the_engines_of_a_board(
    sources: tuple[Path, Path], tmp_path: Path, run: Run
) -> None:
    calls = fake_trtexec.install(tmp_path, trouble="sparse")
    python = fake_trtexec.python_beside(tmp_path)
    told = Told()
    wanted = asked(sources, tmp_path, target="orin", host_python=python)
    manifest = compile_model(wanted, progress=told)
    out = tmp_path / "out"
    assert (manifest.verdict, manifest.runtime) == ("validated", "tensorrt")
    assert any("engines are built on board" in line for line in told.infos)
    latency = manifest.latency
    assert (latency.table_kind, latency.by_default) == ("measured", None)
    assert latency.fingerprint["runtime_version"] == "10.3.0"
    assert "without transfers" in str(latency.session_options["trtexec"])
    # That trtexec takes a millisecond for each ten kilobytes: these very files were timed.
    files = [(out / name).read_bytes() for name in ("reference.onnx", "model.onnx")]
    ms = [(len(file) - file.count(0)) / 1e4 for file in files]
    assert [latency.reference_ms, latency.compiled_ms] == pytest.approx(ms, rel=0.01)
    assert latency.speedup >= 1.2
    table = read_table(next((tmp_path / "cache/tables/orin@board").rglob("*.json")))
    assert {e.level.numeric for e in table.entries} >= {"fp16", "int8-static"}
    assert {e.level.pattern for e in table.entries} == {"dense", "2:4"}
    assert any(n.startswith("engine of model.onnx: ") for n in latency.notes)
    assert f"# Measured on board: {latency.compiled_ms:.3g} ms" in (out / "build.sh").read_text()
    built = [json.loads(line) for line in calls.read_text().splitlines()]
    assert all("--stronglyTyped" in words for words in built if "--skipInference" in words)
    before = len(built)
    again = profile_model(wanted, progress=Told())
    assert again.from_cache
    assert len(calls.read_text().splitlines()) == before
    there = ("--host", loopback.ALIAS, "--host-python", python)
    assert run("bench", str(out), *there)[0] == 0
    code, shown, _ = run("inspect", str(out))
    assert code == 0
    assert f"next: zipc bench {out} --host board --host-python {python}" in shown
    assert "zipc check" not in shown  # it times here
    fake_trtexec.install_gpu(tmp_path, name="RTX 4090", capability="8.9")
    for verb in ("bench", "validate"):
        code, _, err = run(verb, str(out), *there)
        assert (code, "board is RTX 4090, 550.54, of compute capability 8.9" in err) == (2, True)
    with pytest.raises(UsageError, match=r"target 'orin' is one of 8\.7"):
        profile_model(wanted, progress=Told())
    for said in ("8.7", "[Not Supported]"):
        fake_trtexec.install_gpu(tmp_path, name="Orin", capability=said)
        code, shown, _ = run("validate", str(out), *there)
        assert (code, "orin on board (Orin, 550.54) under tensorrt" in shown) == (0, True)


def test_what_tensorrt_refuses_is_told_by_its_name(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    fake_trtexec.install(tmp_path, trouble="refused")
    python = fake_trtexec.python_beside(tmp_path)
    with pytest.raises(EngineFailed, match=r"TensorRT 10\.3\.0 refuses the graph.*/Tile"):
        profile_model(asked(sources, tmp_path, target="orin", host_python=python), progress=Told())
