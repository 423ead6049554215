"""The proof: reference and candidate timed alternately, a speedup and what it is worth."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from zipc.core.errors import UsageError
from zipc.core.types import PairedTiming, Progress, Runner, Silent, VerdictName, Workload
from zipc.manifest import TENSORRT
from zipc.profiler.device import Device, TimedGraph
from zipc.profiler.timing import interleave, warm_up

MIN_PAIRS = 16  # fewer give no interval
TOO_WIDE = 0.05  # half-width of the interval of log speedup beyond which nothing is decided
VERDICT_BUDGET_MS = 22_000.0
LOADS, LOAD_SECONDS = (4, 8), 40.0  # of both graphs in a proof: as many as fit, in twos
FEWEST_EACH = 4  # pairs
WARM_RUNS = 20  # at most, of a graph that was just loaded

_CLIP = 4.0  # robust standard deviations: beyond lies a spike, not the graph
_MAX_BATCHES = 12
_MIN_BATCHES = 6
_CORRELATED = 0.1  # correlation of neighbouring batches that is still ignored


def prove(
    device: Device,
    reference: bytes,
    candidate: bytes,
    *,
    workload: Workload,
    pairs: int | None = None,
    progress: Progress | None = None,
) -> tuple[PairedTiming, TimedGraph]:
    """Time two graphs alternately, loaded anew several times, and return reference / candidate with
    its 95 % interval, beside the candidate as it was loaded last.

    Where in memory a graph comes to lie makes it faster or slower for as long as it is loaded, by
    more than its runs differ: what is measured of one load, the next one misses. Each load is in a
    process of its own and has its share of the pairs; which graph comes first alternates. trtexec
    loads an engine anew for every series of runs by itself. By default there are as many pairs as
    `default_pairs` gives.

    Raises:
        UsageError: fewer than 16 pairs were asked for.
        NoisyMeasurement: the clock gave something that is not a positive time.
        ExportMismatch: the runtime cannot load a graph.
        EngineFailed: TensorRT refuses a graph.
        RemoteError: the device cannot be reached, or lacks what it needs.
    """
    if pairs is not None:
        _refuse_few(pairs)
    progress = progress or Silent()
    progress.stage("load graphs")
    samples: tuple[list[float], list[float]] = ([], [])
    started = time.monotonic()
    graphs = _loaded(device, (reference, candidate), workload)
    seconds = time.monotonic() - started
    if pairs is None:
        pairs = default_pairs(warm_up(graphs[0], max_runs=WARM_RUNS)[-1])
    loads = 1 if device.runtime == TENSORRT else _loads(seconds, pairs)
    each = pairs if loads == 1 else max(pairs // loads // 2 * 2, FEWEST_EACH)
    progress.stage("proof", total=loads * each)
    for load in range(loads):
        if load > 0:
            del graphs  # ends the process before the next one starts
            graphs = _loaded(device, (reference, candidate), workload, backwards=load % 2 == 1)
        taken = interleave(graphs, rounds=each, on_round=progress.advance)
        for held, more in zip(samples, taken, strict=True):
            held += more
    timing = paired_timing(*samples, loads=loads)
    progress.done(f"{timing.speedup:.3f}x [{timing.ci95[0]:.3f}, {timing.ci95[1]:.3f}]")
    return timing, graphs[1]


def _loaded(
    device: Device, models: Sequence[bytes], workload: Workload, *, backwards: bool = False
) -> list[TimedGraph]:
    """Graphs in a new process, loaded in turn or backwards, and warm."""
    timer = device.timer()
    order = reversed(models) if backwards else models
    graphs = [timer.load(model, workload=workload) for model in order]
    for graph in graphs:
        warm_up(graph, max_runs=WARM_RUNS)
    return graphs[::-1] if backwards else graphs


def _loads(seconds: float, pairs: int) -> int:
    """How often two graphs that take `seconds` to load are loaded for a number of pairs."""
    fewest, most = LOADS
    fitting = min(LOAD_SECONDS / seconds, pairs / FEWEST_EACH)
    return 2 * round(min(max(fitting // 2, fewest / 2), most / 2))


def paired_speedup(reference: Runner, candidate: Runner, *, pairs: int) -> PairedTiming:
    """Time both alternately and return reference / candidate with its 95 % interval, which is of
    the two as they are loaded: see `prove`.

    The speedup is the exponential of the median over batch means of paired log-ratios.

    Raises:
        UsageError: fewer than 16 pairs were asked for.
        NoisyMeasurement: a runner returned something that is not a positive time.
    """
    _refuse_few(pairs)
    warm_up(reference)
    warm_up(candidate)
    return paired_timing(*interleave((reference, candidate), rounds=pairs))


def _refuse_few(pairs: int) -> None:
    if pairs < MIN_PAIRS:
        raise UsageError(f"{pairs} pairs give no interval; ask for at least {MIN_PAIRS}.")


def paired_timing(
    reference_ms: Sequence[float], candidate_ms: Sequence[float], *, loads: int = 1
) -> PairedTiming:
    """Turn alternating samples into a speedup with its 95 % interval.

    Of several loads, each has as many samples; the interval is of what loads differ by.
    """
    log_ratios = np.log(reference_ms) - np.log(candidate_ms)
    batches = f"{len(reference_ms)} pairs in "
    if loads == 1:
        interval = log_ratio_interval(log_ratios)
        batches += f"{interval.batches} batches of {interval.batch_size}"
    else:
        each = log_ratios.reshape(loads, -1)
        means = np.array([_without_spikes(values).mean() for values in each])
        interval = batch_interval(means, alpha=0.05, batch_size=each.shape[1])
        batches += f"{loads} loads of both graphs"
    wide = interval.half_width > TOO_WIDE
    notes = [batches]
    if wide:
        notes.append(f"too noisy: the interval is +-{math.expm1(interval.half_width):.1%} wide")
    return PairedTiming(
        reference_ms=tuple(reference_ms),
        candidate_ms=tuple(candidate_ms),
        speedup=math.exp(interval.estimate),
        ci95=(math.exp(interval.lower), math.exp(interval.upper)),
        inconclusive=wide,
        loads=loads,
        notes=tuple(notes),
    )


def of_builds(timings: Sequence[PairedTiming]) -> PairedTiming:
    """The speedup of several builds of the same graphs: that of their middle one.

    The interval reaches over all of them, since the next build may be any.
    """
    if len(timings) == 1:
        return timings[0]
    found = [t.speedup for t in timings]
    told = ", ".join(f"{speedup:.3f}x" for speedup in found)
    return PairedTiming(
        reference_ms=tuple(ms for t in timings for ms in t.reference_ms),
        candidate_ms=tuple(ms for t in timings for ms in t.candidate_ms),
        speedup=float(np.median(found)),
        ci95=(min(t.ci95[0] for t in timings), max(t.ci95[1] for t in timings)),
        inconclusive=any(t.inconclusive for t in timings),
        notes=(f"{len(timings)} builds: {told}", *(n for t in timings for n in t.notes)),
    )


def verdict(
    timing: PairedTiming, target_speedup: float, *, by_default: PairedTiming | None = None
) -> VerdictName:
    """Say what a timing proves.

    `validated`: the lower end of the interval meets the target. `missed`: the speedup itself is
    below it, by a measurement good enough to say so. `inconclusive`: anything else. Where the
    promise also holds `by_default`, under the runtime's default options, a whole interval below
    the target misses it; its lower end decides nothing, since threads that spin for processors
    which others use too make it wide.
    """
    if by_default is not None and by_default.ci95[1] < target_speedup:
        return "missed"
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
