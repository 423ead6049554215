"""The proof: reference and candidate timed alternately, a speedup and what it is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from zipc.core.errors import CorruptFile, UsageError
from zipc.core.files import read_json
from zipc.core.types import PairedTiming, Progress, Runner, Silent, VerdictName, Workload
from zipc.core.workload import read_workload, workload_document
from zipc.manifest import TENSORRT, latency_of, recorded_runtime
from zipc.profiler.device import Device, LocalDevice, local_device
from zipc.profiler.facts import machine
from zipc.profiler.timing import interleave, warm_up

MIN_PAIRS = 16  # fewer give no interval
TOO_WIDE = 0.05  # half-width of the interval of log speedup beyond which nothing is decided
VERDICT_BUDGET_MS = 22_000.0

_CLIP = 4.0  # robust standard deviations: beyond lies a spike, not the graph
_MAX_BATCHES = 12
_MIN_BATCHES = 6
_CORRELATED = 0.1  # correlation of neighbouring batches that is still ignored


def paired_speedup(
    reference: Runner, candidate: Runner, *, pairs: int, progress: Progress | None = None
) -> PairedTiming:
    """Time both alternately and return reference / candidate with its 95 % interval.

    The speedup is the exponential of the median over batch means of paired log-ratios.

    Raises:
        UsageError: fewer than 16 pairs were asked for.
        NoisyMeasurement: a runner returned something that is not a positive time.
    """
    if pairs < MIN_PAIRS:
        raise UsageError(f"{pairs} pairs give no interval; ask for at least {MIN_PAIRS}.")
    progress = progress or Silent()
    progress.stage("proof", total=pairs)
    warm_up(reference)
    warm_up(candidate)
    reference_ms, candidate_ms = interleave(
        (reference, candidate), rounds=pairs, on_round=progress.advance
    )
    timing = paired_timing(reference_ms, candidate_ms)
    progress.done(f"{timing.speedup:.3f}x [{timing.ci95[0]:.3f}, {timing.ci95[1]:.3f}]")
    return timing


def paired_timing(reference_ms: Sequence[float], candidate_ms: Sequence[float]) -> PairedTiming:
    """Turn alternating samples into a speedup with its 95 % interval."""
    interval = log_ratio_interval(np.log(reference_ms) - np.log(candidate_ms))
    wide = interval.half_width > TOO_WIDE
    notes = [f"{len(reference_ms)} pairs in {interval.batches} batches of {interval.batch_size}"]
    if wide:
        notes.append(f"too noisy: the interval is +-{math.expm1(interval.half_width):.1%} wide")
    return PairedTiming(
        reference_ms=tuple(reference_ms),
        candidate_ms=tuple(candidate_ms),
        speedup=math.exp(interval.estimate),
        ci95=(math.exp(interval.lower), math.exp(interval.upper)),
        inconclusive=wide,
        notes=tuple(notes),
    )


def verdict(timing: PairedTiming, target_speedup: float) -> VerdictName:
    """Say what a timing proves.

    `validated`: the lower end of the interval meets the target. `missed`: the speedup itself is
    below it, by a measurement good enough to say so. `inconclusive`: anything else.
    """
    lower, upper = timing.ci95
    if lower >= target_speedup:
        return "validated"
    if timing.speedup < target_speedup and (upper < target_speedup or not timing.inconclusive):
        return "missed"
    return "inconclusive"


def default_pairs(reference_ms: float) -> int:
    """Pairs that keep a verdict under about 25 s, between 60 and 400.

    A pair is four runs (one untimed and one timed of each), none slower than the reference.
    """
    return max(60, min(400, int(VERDICT_BUDGET_MS / (4 * reference_ms))))


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Return the p50, p90 and p99 of samples."""
    p50, p90, p99 = np.quantile(np.asarray(samples, dtype=float), (0.5, 0.9, 0.99))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A repeated proof, beside what the manifest promised."""

    out: str
    workload: Workload
    promised_speedup: float  # what has to be met here
    recorded_speedup: float  # what the manifest has: measured or predicted before
    timing: PairedTiming
    verdict: VerdictName
    session_options: Mapping[str, Any]
    fingerprint: Mapping[str, Any]  # of the device
    states: tuple[Mapping[str, Any], Mapping[str, Any]]  # its clocks and heat before and after

    @property
    def holds(self) -> bool:
        return self.verdict == "validated"

    @property
    def exit_code(self) -> int:
        return {"validated": 0, "missed": 1}.get(self.verdict, 3)

    @property
    def state(self) -> dict[str, Any]:
        before, after = self.states
        return {"before": dict(before), "after": dict(after)}

    def to_json(self) -> dict[str, Any]:
        """Return a document for `--format json`; raw samples included."""
        timing = self.timing
        return {
            "out": self.out,
            "workload": workload_document(self.workload),
            "promised_speedup": self.promised_speedup,
            "recorded_speedup": self.recorded_speedup,
            "speedup": timing.speedup,
            "speedup_ci95": list(timing.ci95),
            "pairs": len(timing.reference_ms),
            "reference_ms": percentiles(timing.reference_ms),
            "compiled_ms": percentiles(timing.candidate_ms),
            "verdict": self.verdict,
            "holds": self.holds,
            "notes": list(timing.notes),
            "session_options": dict(self.session_options),
            "device": dict(self.fingerprint),
            "state": self.state,
            "samples_ms": {
                "reference": list(timing.reference_ms),
                "compiled": list(timing.candidate_ms),
            },
        }


def bench(
    out: Path,
    *,
    pairs: int | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    device: Device | None = None,
) -> BenchResult:
    """Measure OUT/model.onnx against OUT/reference.onnx again and judge the manifest's promise.

    The promise is the requested speedup; where a latency was requested, that latency; where
    neither was, the lower end of the recorded interval. Without a `device`, it is this machine
    under the runtime of the manifest.

    Raises:
        UsageError: a file of the folder is missing, or the proof is that of another device.
        CorruptFile: the manifest is truncated or lacks a field.
        NoisyMeasurement: the clock gave something that is not a positive time.
        EngineFailed: TensorRT refuses a graph.
        RemoteError: the device cannot be reached, or lacks what it needs.
    """
    if device is None or isinstance(device, LocalDevice):
        manifest = _manifest(out)
        refuse_elsewhere(manifest, out)
        device = device or local_device(recorded_runtime(manifest))
    return measure(out, pairs=pairs, progress=progress, threads=threads, device=device)


def measure(
    out: Path,
    *,
    device: Device,
    pairs: int | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
) -> BenchResult:
    """The same on any device that runs the graphs, wherever they were measured before."""
    manifest = _manifest(out)
    path = out / "manifest.json"
    workload = _workload(manifest, threads=threads, path=path)
    recorded = _recorded(manifest, path=path)
    _refuse_runtime(manifest, out, runtime=device.runtime)
    _promise(manifest, reference_ms=1.0, path=path)  # fails before minutes of measuring
    progress = progress or Silent()
    before = device.state()
    timer = device.timer()
    names = ("reference.onnx", "model.onnx")
    progress.stage("load graphs", total=len(names))
    graphs = []
    for name in names:
        graphs.append(timer.load((out / name).read_bytes(), workload=workload))
        progress.advance(note=name)
    reference, candidate = graphs
    if pairs is None:
        pairs = default_pairs(float(np.median(warm_up(reference, max_runs=10)[-3:])))
    timing = paired_speedup(reference, candidate, pairs=pairs, progress=progress)
    promised = _promise(manifest, reference_ms=float(np.median(timing.reference_ms)), path=path)
    return BenchResult(
        out=str(out),
        workload=workload,
        promised_speedup=promised,
        recorded_speedup=recorded,
        timing=timing,
        verdict=verdict(timing, promised),
        session_options=candidate.session_options,
        fingerprint=device.fingerprint(),
        states=(before, device.state()),
    )


def refuse_elsewhere(manifest: Any, out: Path) -> None:
    """Refuse to time an artifact here that was made for, or measured on, another device.

    Raises:
        UsageError: its latency was predicted, or measured on a board.
    """
    if recorded_runtime(manifest) == TENSORRT:
        raise _not_here(manifest, out)
    prints = latency_of(manifest).get("fingerprint") or {}
    if "host" in prints and prints.get("machine") != machine():
        host = prints["host"]
        raise UsageError(
            f"{out} was measured on {host}, which is not this machine: times taken here say "
            f"nothing about it. Measure it there with zipc bench {out} --host {host}, or make this "
            f"machine its device with zipc validate {out}."
        )


def _refuse_runtime(manifest: Any, out: Path, *, runtime: str) -> None:
    wanted = recorded_runtime(manifest)
    if wanted == runtime:
        return
    if wanted == TENSORRT:
        raise _not_here(manifest, out)
    raise UsageError(f"{out} was made for {wanted}, and times of {runtime} say nothing about it.")


def _not_here(manifest: Any, out: Path) -> UsageError:
    return UsageError(
        f"{out} was made for target '{manifest.get('target')}', which is not this machine: "
        "times taken here say nothing about it. Name the device with --host user@board "
        f"(bench and validate), or run {out}/build.sh there."
    )


def _manifest(out: Path) -> Any:
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder. Give the output folder of a zipc compile.")
    for name, command in (
        ("manifest.json", "Run: zipc compile MODEL ... -o OUT"),
        ("model.onnx", "Run zipc compile again with the same -o."),
        ("reference.onnx", "Compile again, without --no-reference."),
    ):
        if not (out / name).is_file():
            raise UsageError(f"{out} has no {name}, which the measurement needs. {command}")
    manifest = read_json(out / "manifest.json", advice="Compile again.")
    if not isinstance(manifest, dict):
        raise CorruptFile(f"{out}/manifest.json is no manifest. Compile again.")
    return manifest


def _workload(manifest: Any, *, threads: int | None, path: Path) -> Workload:
    try:
        recorded = read_workload(manifest["workload"])
        return recorded if threads is None else replace(recorded, threads=threads)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} has no usable workload ({error!r}). Compile again.") from error


def _recorded(manifest: Any, *, path: Path) -> float:
    try:
        return float(manifest["latency"]["speedup"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} records no speedup ({error!r}). Compile again.") from error


def _promise(manifest: Any, *, reference_ms: float, path: Path) -> float:
    try:
        request = manifest["request"]
        if request.get("speedup") is not None:
            return float(request["speedup"])
        if request.get("latency_ms") is not None:
            return reference_ms / float(request["latency_ms"])
        return float(manifest["latency"]["speedup_ci95"][0])
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CorruptFile(f"{path} promises nothing usable ({error!r}). Compile again.") from error


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of a mean log-ratio."""

    estimate: float
    lower: float
    upper: float
    batches: int
    batch_size: int  # pairs

    @property
    def half_width(self) -> float:
        return (self.upper - self.lower) / 2


def log_ratio_interval(log_ratios: Sequence[float] | np.ndarray, alpha: float = 0.05) -> Interval:
    """Estimate the typical log-ratio of pairs taken in time order, at confidence `1 - alpha`.

    Spikes are clipped at four robust standard deviations. Neighbouring rounds, which run in
    opposite order, are averaged, then batched: batches are long enough for the estimated
    autocorrelation and at most 12, so that they also cover a slower one that the first lag does
    not show. A t-interval of the batch means follows, widened by what correlation they keep
    (method of batch means: Law and Carson 1979). The estimate is their median.
    """
    values = _without_spikes(np.asarray(log_ratios, dtype=float))
    rounds = values[len(values) % 2 :].reshape(-1, 2).mean(axis=1)
    size, kept = _batch_size(rounds)
    count = len(rounds) // size
    means = rounds[len(rounds) - count * size :].reshape(count, size).mean(axis=1)
    return batch_interval(means, alpha=alpha, batch_size=2 * size, correlation=kept)


def batch_interval(
    means: np.ndarray, *, alpha: float, batch_size: int, correlation: float = 0.0
) -> Interval:
    """Give the t-interval of batches in time order that keep `correlation` with their neighbour.

    A correlation that the batches themselves show beyond its own noise counts where it is larger.
    """
    count = len(means)
    estimate, centre = float(np.median(means)), float(means.mean())
    shown = min(_lag_one(means) - 1 / math.sqrt(count), 0.9)
    correlation = max(correlation, shown)
    error = float(means.std(ddof=1)) * math.sqrt((1 + correlation) / (1 - correlation) / count)
    reach = float(stats.t.isf(alpha / 2, count - 1)) * error
    return Interval(
        estimate=estimate,
        lower=min(centre - reach, estimate),
        upper=max(centre + reach, estimate),
        batches=count,
        batch_size=batch_size,
    )


def _without_spikes(values: np.ndarray) -> np.ndarray:
    middle = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - middle))
    if spread == 0:
        return values
    clipped: np.ndarray = np.clip(values, middle - _CLIP * spread, middle + _CLIP * spread)
    return clipped


def _batch_size(values: np.ndarray) -> tuple[int, float]:
    """Return a batch size and the correlation its batch means keep, by an AR(1) model."""
    size = max(1, math.ceil(len(values) / _MAX_BATCHES))
    largest = max(1, len(values) // _MIN_BATCHES)
    rho = min(max(_lag_one(values), 0.0), 0.98)
    while size < largest and _batch_correlation(rho, size) > _CORRELATED:
        size += 1
    return size, _batch_correlation(rho, size)


def _lag_one(values: np.ndarray) -> float:
    """Lag-1 autocorrelation, corrected for its small-sample bias -(1 + 3 rho) / n."""
    centred = values - values.mean()
    power = float(centred @ centred)
    if power == 0:
        return 0.0
    raw = float(centred[:-1] @ centred[1:]) / power
    return raw + (1 + 3 * max(raw, 0.0)) / len(values)


def _batch_correlation(rho: float, size: int) -> float:
    """Correlation of the means of neighbouring batches of an AR(1) series."""
    if rho <= 0:
        return 0.0
    lags = np.arange(1, size)
    variance = size + 2 * float(((size - lags) * rho**lags).sum())
    shared = rho * ((1 - rho**size) / (1 - rho)) ** 2
    return float(shared / variance)
