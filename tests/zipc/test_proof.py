"""The paired speedup: coverage in simulation, verdicts, and the repeated proof of a folder."""

from __future__ import annotations

import itertools
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import loopback
from zipc.bench import bench
from zipc.core.errors import CorruptFile, NoisyMeasurement, UsageError
from zipc.core.files import sha256_file
from zipc.core.types import PairedTiming, Workload
from zipc.profiler.device import LocalDevice
from zipc.profiler.remote import Host, RemoteDevice
from zipc.proof import (
    default_pairs,
    log_ratio_interval,
    paired_speedup,
    paired_timing,
    percentiles,
    prove,
    verdict,
)


class Fake:
    """A runner with a true time, a relative noise and spikes, driven by a seeded generator."""

    def __init__(self, ms: float, *, noise: float = 0.0, spikes: float = 0.0, seed: int = 0):
        self.ms, self.noise, self.spikes = ms, noise, spikes
        self.rng = np.random.default_rng(seed)

    def run(self) -> float:
        spike = self.rng.exponential(2) if self.rng.random() < self.spikes else 0.0
        return float(self.ms * np.exp(self.noise * self.rng.normal()) * (1 + spike))


def _autoregressive(rng: np.random.Generator, count: int, rho: float) -> np.ndarray:
    values = [rng.normal()]
    for shock in rng.normal(size=count - 1) * np.sqrt(1 - rho**2):
        values.append(rho * values[-1] + shock)
    return np.array(values)


def _spiky(rng: np.random.Generator, count: int) -> np.ndarray:
    hits = (rng.random((2, count)) < 0.04) * rng.exponential(10, (2, count))
    return rng.normal(size=count) + hits[0] - hits[1]


SERIES = {
    "white": lambda rng, n: rng.normal(size=n),
    "autocorrelated 0.5": lambda rng, n: _autoregressive(rng, n, 0.5),
    "autocorrelated 0.8": lambda rng, n: _autoregressive(rng, n, 0.8),
    "white over slow": lambda rng, n: rng.normal(size=n) + _autoregressive(rng, n, 0.8) / 2,
    "order effect": lambda rng, n: rng.normal(size=n) + 2 * (-1.0) ** np.arange(n),
    "drifting": lambda rng, n: rng.normal(size=n) + np.linspace(-1, 1, n),
    "spiky": _spiky,
    "heavy tails": lambda rng, n: rng.standard_t(2, size=n),
}


@pytest.mark.parametrize("kind", SERIES)
def test_nominal_95_percent_interval_covers_at_least_92_percent(kind: str):
    rng = np.random.default_rng(11)
    trials = 500
    covered = 0
    for _ in range(trials):
        interval = log_ratio_interval(0.7 + 0.04 * SERIES[kind](rng, 200))
        covered += interval.lower <= 0.7 <= interval.upper
    assert covered / trials >= 0.92


def test_interval_narrows_with_the_root_of_the_sample_where_noise_is_white():
    rng = np.random.default_rng(3)

    def width(count: int) -> float:
        return float(
            np.mean([log_ratio_interval(rng.normal(size=count)).half_width for _ in range(200)])
        )

    assert width(100) / width(1600) == pytest.approx(4, rel=0.2)


def test_autocorrelation_widens_the_interval_by_what_theory_says():
    rng = np.random.default_rng(4)

    def width(rho: float) -> float:
        series = (_autoregressive(rng, 400, rho) for _ in range(200))
        return float(np.mean([log_ratio_interval(values).half_width for values in series]))

    assert width(0.6) / width(0.0) == pytest.approx(np.sqrt(1.6 / 0.4), rel=0.2)


def test_a_noiseless_pair_gives_its_exact_speedup():
    timing = paired_speedup(Fake(20.0), Fake(8.0), pairs=20)
    assert timing.speedup == pytest.approx(2.5)
    assert timing.ci95 == pytest.approx((2.5, 2.5))
    assert len(timing.reference_ms) == len(timing.candidate_ms) == 20


def test_a_noisy_spiky_pair_is_near_its_speedup_and_inside_its_interval():
    reference = Fake(20.0, noise=0.04, spikes=0.02, seed=1)
    candidate = Fake(10.0, noise=0.04, spikes=0.02, seed=2)
    timing = paired_speedup(reference, candidate, pairs=300)
    assert timing.speedup == pytest.approx(2.0, rel=0.015)
    assert timing.ci95[0] <= 2.0 <= timing.ci95[1]
    assert not timing.inconclusive
    assert timing.ci95[1] / timing.ci95[0] < 1.03


def test_hopeless_noise_is_inconclusive():
    timing = paired_speedup(Fake(20.0, noise=0.8, seed=1), Fake(10.0, noise=0.8, seed=2), pairs=60)
    assert timing.inconclusive
    assert verdict(timing, 2.0) == "inconclusive"


def test_too_few_pairs_and_impossible_times_are_refused():
    with pytest.raises(UsageError, match="at least"):
        paired_speedup(Fake(2.0), Fake(1.0), pairs=5)
    with pytest.raises(NoisyMeasurement):
        paired_speedup(Fake(2.0), Fake(float("nan")), pairs=20)


def _lucky_loads(rng: np.random.Generator, loads: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of two equal graphs, whose loads differ by more than runs of a load do."""
    luck = 0.02 * rng.normal(size=(2, loads, 1))
    times = 10 * np.exp(luck + 0.01 * rng.normal(size=(2, loads, 200 // loads)))
    return times[0].ravel(), times[1].ravel()


@pytest.mark.parametrize("loads", [4, 6, 8])
def test_an_interval_over_loads_covers_what_they_differ_by(loads: int):
    rng = np.random.default_rng(loads)
    trials = [paired_timing(*_lucky_loads(rng, loads), loads=loads) for _ in range(400)]
    assert sum(t.ci95[0] <= 1.0 <= t.ci95[1] for t in trials) >= 0.92 * 400


def test_an_interval_of_one_load_does_not():
    rng = np.random.default_rng(1)
    trials = [paired_timing(*_lucky_loads(rng, 1)) for _ in range(100)]
    assert sum(t.ci95[0] <= 1.0 <= t.ci95[1] for t in trials) < 50


class Lucky(LocalDevice):
    """A device on which each load of a graph has its own speed, and the first of a process is
    slower."""

    def __init__(self, seed: int, runtime: str = "onnxruntime"):
        super().__init__(runtime)
        object.__setattr__(self, "rng", np.random.default_rng(seed))
        object.__setattr__(self, "loaded", [])

    def timer(self) -> Any:
        self.loaded.append([])
        return self

    def load(self, model: bytes, **_: object) -> Fake:
        self.loaded[-1].append(model)
        first = 1.02 if len(self.loaded[-1]) == 1 else 1.0
        ms = 60.0 * first * np.exp(0.01 * self.rng.normal())
        return Fake(ms, noise=0.005, seed=int(self.rng.integers(1 << 30)))


def test_proofs_of_a_graph_against_itself_hold_1():
    held = 0
    for seed in range(100):
        timing, _ = prove(Lucky(seed), b"graph", b"graph", workload=Workload(), pairs=64)
        held += timing.ci95[0] <= 1.0 <= timing.ci95[1]
        assert timing.loads == 8
    assert held >= 90


def test_each_load_has_a_new_process_and_the_other_graph_first():
    device = Lucky(0)
    timing, candidate = prove(device, b"dense", b"compiled", workload=Workload(), pairs=40)
    assert device.loaded == [[b"dense", b"compiled"], [b"compiled", b"dense"]] * 4
    assert len(timing.reference_ms) == len(timing.candidate_ms) == 8 * 4
    assert candidate.run() > 0
    assert timing.notes == ("32 pairs in 8 loads of both graphs",)


def test_only_one_load_is_held_at_a_time():
    held: list[weakref.ref[Fake]] = []

    class Counting(Lucky):
        def timer(self) -> Any:
            assert all(graph() is None for graph in held)
            return super().timer()

        def load(self, model: bytes, **rest: object) -> Fake:
            graph = super().load(model, **rest)
            held.append(weakref.ref(graph))
            return graph

    prove(Counting(0), b"dense", b"compiled", workload=Workload(), pairs=40)
    assert len(held) == 2 * 8


def test_what_takes_long_to_load_is_loaded_four_times(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr("zipc.proof.time.monotonic", lambda: next(clock))
    timing, _ = prove(Lucky(0), b"dense", b"compiled", workload=Workload(), pairs=60)
    assert timing.loads == 4
    assert len(timing.reference_ms) == 4 * 14


def test_engines_are_built_once():
    device = Lucky(0, runtime="tensorrt")
    timing, _ = prove(device, b"dense", b"compiled", workload=Workload(), pairs=61)
    assert device.loaded == [[b"dense", b"compiled"]]
    assert timing.loads == 1
    assert len(timing.reference_ms) == 61


def test_a_proof_of_too_few_pairs_loads_nothing():
    device = Lucky(0)
    with pytest.raises(UsageError, match="at least"):
        prove(device, b"dense", b"compiled", workload=Workload(), pairs=15)
    assert device.loaded == []


def _timing(speedup: float, lower: float, upper: float, inconclusive: bool = False) -> PairedTiming:
    return PairedTiming((), (), speedup, (lower, upper), inconclusive)


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        (_timing(2.04, 2.0, 2.08), "validated"),
        (_timing(2.6, 2.1, 3.2, inconclusive=True), "validated"),
        (_timing(2.02, 1.99, 2.05), "inconclusive"),
        (_timing(1.99, 1.97, 2.01), "missed"),
        (_timing(1.99, 1.7, 2.3, inconclusive=True), "inconclusive"),
        (_timing(1.5, 1.3, 1.7, inconclusive=True), "missed"),
    ],
)
def test_verdict_follows_the_lower_end_of_the_interval(timing: PairedTiming, expected: str):
    assert verdict(timing, 2.0) == expected


@pytest.mark.parametrize("reference_ms", [0.05, 5.0, 17.0, 90.0, 1000.0])
def test_default_pairs_stay_in_the_time_budget_but_never_below_sixty(reference_ms: float):
    pairs = default_pairs(reference_ms)
    assert 60 <= pairs <= 400
    assert pairs == 60 or pairs * 4 * reference_ms <= 25_000


def test_percentiles_of_a_known_sample():
    found = percentiles([float(value) for value in range(101)])
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def _matmul(path: Path, width: int) -> None:
    weight = np.ones((64, width), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("ReduceMean", ["h"], ["y"], keepdims=0),
        ],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))


def _folder(path: Path, **request: float) -> Path:
    _matmul(path / "reference.onnx", 2048)
    _matmul(path / "model.onnx", 64)
    manifest = {
        "workload": {"batch_size": 1, "sequence_length": 128, "threads": 1},
        "request": request,
        "latency": {"speedup": 9.0, "speedup_ci95": [1.1, 10.0]},
        "files": [
            {"path": name, "kind": name, "sha256": sha256_file(path / name)}
            for name in ("model.onnx", "reference.onnx")
        ],
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


SEEDS = itertools.count()


class Scripted(LocalDevice):
    """A device on which the larger graph takes twice as long (2.02 times); its own timer."""

    def timer(self) -> Any:
        return self

    def load(self, model: bytes, **_: object) -> Fake:
        runner = Fake(20.0 if len(model) > 100_000 else 9.9, noise=0.002, seed=next(SEEDS))
        runner.session_options = {}
        return runner


@pytest.mark.parametrize(
    ("request_", "holds"),
    [
        ({"speedup": 1.9}, True),
        ({"speedup": 2.2}, False),
        ({"latency_ms": 9.0}, False),
        ({"latency_ms": 11.0}, True),
        ({}, True),
    ],
)
def test_bench_judges_the_promise_of_the_manifest(
    tmp_path: Path,
    request_: dict[str, float],
    holds: bool,
):
    result = bench(_folder(tmp_path, **request_), pairs=48, device=Scripted("onnxruntime"))
    assert result.timing.speedup == pytest.approx(2.0, rel=0.05)
    assert result.holds is holds
    assert result.exit_code == (0 if holds else 1)
    document = json.loads(json.dumps(result.to_json()))
    assert document["pairs"] == len(document["samples_ms"]["reference"]) == 48
    assert document["recorded_speedup"] == 9.0
    assert document["reference_ms"]["p50"] <= document["reference_ms"]["p99"]


@pytest.mark.parametrize(
    ("timing", "expected"),
    [
        (_timing(2.04, 2.02, 2.06), "validated"),
        (_timing(2.00, 1.97, 2.03), "validated"),
        (_timing(1.98, 1.97, 1.99), "missed"),
        (_timing(2.0, 1.8, 2.2, inconclusive=True), "inconclusive"),
    ],
)
def test_a_speedup_that_nobody_asked_for_is_only_missed_by_a_whole_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timing: PairedTiming, expected: str
):
    folder = _folder(tmp_path)
    document = json.loads((folder / "manifest.json").read_text())
    document["latency"]["speedup_ci95"] = [2.0, 2.1]
    (folder / "manifest.json").write_text(json.dumps(document))
    timing = replace(timing, reference_ms=(2.0,), candidate_ms=(1.0,))
    candidate = Scripted("onnxruntime").load(b"")
    monkeypatch.setattr("zipc.bench.prove", lambda *_, **__: (timing, candidate))
    assert bench(folder, device=Scripted("onnxruntime")).verdict == expected


@pytest.mark.parametrize(("factor", "exit_code"), [(1.0, 0), (0.9, 1)])
def test_bench_judges_default_options_where_they_are_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, exit_code: int
):
    def by_default(*_: object) -> PairedTiming:
        return PairedTiming((), (), 1.9 * factor, (1.85 * factor, 2.0 * factor))

    monkeypatch.setattr("zipc.bench.by_default", by_default)
    folder, device = _folder(tmp_path, speedup=1.9), Scripted("onnxruntime")
    assert bench(folder, pairs=48, device=device).to_json()["by_default"] is None
    document = json.loads((folder / "manifest.json").read_text())
    document["latency"]["by_default"] = {"promised": True}
    (folder / "manifest.json").write_text(json.dumps(document))
    result = bench(folder, pairs=48, device=device)
    assert result.exit_code == exit_code
    assert result.to_json()["by_default"]["speedup"] == 1.9 * factor


def test_bench_times_real_graphs_on_the_workload_of_the_manifest_unless_told_otherwise(
    tmp_path: Path,
):
    result = bench(_folder(tmp_path, speedup=1.01), pairs=20, threads=2)
    assert min(result.timing.reference_ms + result.timing.candidate_ms) > 0
    assert result.workload.sequence_length == 128
    assert result.workload.threads == result.session_options["intra_op_num_threads"] == 2


@pytest.mark.parametrize("missing", ["manifest.json", "model.onnx", "reference.onnx"])
def test_bench_names_the_file_it_lacks(tmp_path: Path, missing: str):
    folder = _folder(tmp_path, speedup=2.0)
    (folder / missing).unlink()
    with pytest.raises(UsageError, match=missing):
        bench(folder)


def test_bench_refuses_a_missing_folder_and_a_damaged_manifest(tmp_path: Path):
    with pytest.raises(UsageError, match="not a folder"):
        bench(tmp_path / "absent")
    folder = _folder(tmp_path, speedup=2.0)
    for text in ("{", "[]", "{}", '{"workload": {"batch_size": "x"}}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CorruptFile):
            bench(folder)
    strange = (0, "soon", 10**400)
    for promise in ({"speedup": 0}, *({"latency_ms": figure} for figure in strange)):
        with pytest.raises(CorruptFile, match="promises nothing usable"):
            bench(_folder(tmp_path, **promise))


@pytest.mark.parametrize("name", ["model.onnx", "reference.onnx"])
def test_bench_refuses_graphs_that_are_not_those_of_the_compile(tmp_path: Path, name: str):
    folder = _folder(tmp_path, speedup=1.9)
    _matmul(folder / name, 32)
    with pytest.raises(CorruptFile, match=f"{name} changed"):
        bench(folder, pairs=48, device=Scripted("onnxruntime"))


def test_bench_on_a_board_times_both_graphs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sshd").mkdir()
    sshd = loopback.start(tmp_path / "sshd")
    try:
        monkeypatch.setenv("ZIPC_SSH", sshd.command)
        board = RemoteDevice(Host(loopback.ALIAS, sys.executable), "onnxruntime")
        result = bench(_folder(tmp_path, speedup=1.01), pairs=16, device=board)
    finally:
        sshd.stop()
    assert len(result.timing.reference_ms) == len(result.timing.candidate_ms) == 16
    assert min(result.timing.reference_ms + result.timing.candidate_ms) > 0
