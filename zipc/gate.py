"""The gate: is the new graph slower than the baseline by more than is allowed?

Both graphs run alternately. At most five looks are taken at the data, at sizes set in advance,
and the error rate is spent on them in equal parts (a union bound, so no assumption about how the
looks depend on each other). A rule is `regressed` when the whole interval lies above its limit,
and passes when it lies below. The error rate is 2 % per direction, reached only by a graph that
sits exactly on the limit; benchmarks/bench_gate.py measures it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zipc.bench import recorded_workload, refuse_elsewhere
from zipc.core.errors import UsageError
from zipc.core.files import read_json
from zipc.core.types import Progress, Runner, Silent, Workload
from zipc.core.workload import resized, workload_document
from zipc.manifest import FILE_NAME, recorded_runtime
from zipc.onnx_file import bytes_of, graph_of, inputs_of
from zipc.profiler.device import local_device
from zipc.profiler.runners.registry import RUNNERS
from zipc.profiler.timing import interleave, warm_up
from zipc.proof import (
    MIN_PAIRS,
    Interval,
    batch_interval,
    log_ratio_interval,
    percentiles,
)

Status = Literal["pass", "regressed", "inconclusive"]

ERROR_RATE = 0.02  # per direction, over all looks and all timed rules of one check
LOOKS = 5
FIRST_LOOK = 64  # pairs; earlier only when the time is up
MAX_PAIRS = 4000
QUANTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
EXIT_CODES: Mapping[Status, int] = {"pass": 0, "regressed": 1, "inconclusive": 3}

_SECTIONS = (6, 12)  # fewest and most sections a quantile's interval is made of


@dataclass(frozen=True, slots=True)
class Rule:
    """One clause of --fail-on: what may grow by how much."""

    metric: str  # p50 | p90 | p99 | size
    limit: float  # 0.05 is 5 %

    def __str__(self) -> str:
        return f"{self.metric}:{self.limit * 100:g}%"


@dataclass(frozen=True, slots=True)
class RuleResult:
    """What became of one rule; ratios are new / base."""

    rule: str
    status: Status
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    limit_ratio: float | None = None  # the rule's limit, or --min-delta where that allows more
    note: str = ""


@dataclass(frozen=True, slots=True)
class GateResult:
    """The outcome of a check; `ratio` and `interval` are of new / base at the median."""

    status: Status
    ratio: float | None
    interval: tuple[float, float] | None
    confidence: float  # two-sided, of the intervals at one look
    pairs: int
    looks: int
    rules: tuple[RuleResult, ...]
    new_ms: Mapping[str, float]
    base_ms: Mapping[str, float]
    elapsed_s: float
    workload: Workload | None = None
    error_rate: float = ERROR_RATE

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.status]

    def to_json(self) -> dict[str, Any]:
        """Return a document for `--format json`."""
        load = None if self.workload is None else workload_document(self.workload)
        return {**asdict(self), "workload": load, "exit_code": self.exit_code}


def check(
    new: Path,
    base: Path,
    *,
    fail_on: str = "p50:5%",
    max_time_s: float = 60.0,
    min_delta_ms: float = 0.0,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    runners: tuple[Runner, Runner] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> GateResult:
    """Compare two artifacts (output folders or .onnx files) by the rules of `fail_on`.

    A slowdown below `min_delta_ms` is never a regression. `runners` are those of new and base; by
    default each of the runtime it was compiled for, on the workload of the baseline's manifest (of
    the new one's where the baseline has none) with the sizes and threads that are given.

    Raises:
        UsageError: a rule cannot be read, an artifact is missing or was made for another device, or
            the graphs take other inputs.
        CorruptFile: a manifest has no usable workload.
        ExportMismatch: a runtime cannot load or run a graph.
        NoisyMeasurement: the clock gave something that is not a positive time.
    """
    rules = parse_rules(fail_on)
    if max_time_s <= 0 or min_delta_ms < 0:
        raise UsageError("The largest time must be above 0 s and the smallest delta at least 0 ms.")
    progress = progress or Silent()
    if runners is None:
        _refuse_other_inputs(new, base)
    timed = [rule for rule in rules if rule.metric in QUANTILES]
    decided = {r: _compare_sizes(r, new=new, base=base) for r in rules if r.metric == "size"}
    workload = None
    if timed and runners is None:
        held = {
            artifact: read_json(artifact / FILE_NAME, advice="Compile again.")
            for artifact in (base, new)
            if (artifact / FILE_NAME).is_file()
        }
        workloads = [recorded_workload(m, path=a / FILE_NAME) for a, m in held.items()]
        for artifact, manifest in held.items():
            refuse_elsewhere(manifest, artifact)
        workload = resized(
            workloads[0] if workloads else Workload(),
            batch_size=batch_size,
            sequence_length=sequence_length,
            threads=threads,
        )
        runners = _runner(new, base, held, workload), _runner(base, new, held, workload)
    trial = _Trial(
        timed, max_time_s=max_time_s, min_delta_ms=min_delta_ms, progress=progress, clock=clock
    )
    if timed and runners is not None:
        trial.measure(*runners)
    decided |= trial.results
    overall = trial.interval
    return GateResult(
        status=_overall(result.status for result in decided.values()),
        ratio=None if overall is None else math.exp(overall.estimate),
        interval=None if overall is None else (math.exp(overall.lower), math.exp(overall.upper)),
        confidence=1 - trial.alpha,
        pairs=len(trial.new_ms),
        looks=trial.looks,
        rules=tuple(decided[rule] for rule in rules),
        new_ms=percentiles(trial.new_ms) if trial.new_ms else {},
        base_ms=percentiles(trial.base_ms) if trial.base_ms else {},
        elapsed_s=trial.elapsed_s,
        workload=workload,
    )


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Read rules such as `p50:5%,p99:15%,size:2%`.

    Raises:
        UsageError: a rule is malformed, unknown or given twice.
    """
    rules: dict[str, Rule] = {}
    for clause in text.split(","):
        metric, colon, limit = (part.strip() for part in clause.partition(":"))
        if metric not in {*QUANTILES, "size"} or not colon:
            raise UsageError(
                f"Cannot read the rule {clause.strip()!r}. A rule is p50, p90, p99 or size with "
                "the growth allowed, for example: --fail-on p50:5%,size:2%"
            )
        if metric in rules:
            raise UsageError(f"The rule {metric!r} is given twice in {text!r}. Keep one.")
        rules[metric] = Rule(metric, _percent(limit, clause=clause.strip()))
    return tuple(rules.values())


class _Trial:
    """Collects pairs, looks at them a few times, and keeps what was decided."""

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        max_time_s: float,
        min_delta_ms: float,
        progress: Progress,
        clock: Callable[[], float],
    ) -> None:
        self.results: dict[Rule, RuleResult] = {}
        self.new_ms: list[float] = []
        self.base_ms: list[float] = []
        self.looks = 0
        self.interval: Interval | None = None
        self.elapsed_s = 0.0
        self.alpha = 2 * ERROR_RATE / LOOKS / max(1, len(rules))
        self._rules = rules
        self._max_time_s = max_time_s
        self._min_delta_ms = min_delta_ms
        self._progress = progress
        self._clock = clock
        self._start = 0.0

    def measure(self, new: Runner, base: Runner) -> None:
        self._progress.stage("check")
        self._start = self._clock()
        for runner in (base, new):
            warm_up(runner, max_runs=10)
        self._collect(base, new, until=MIN_PAIRS)
        planned = self._planned_looks()
        for size in planned:
            in_time = self._collect(base, new, until=size)
            last = size == planned[-1] or not in_time
            self._look(last)
            found = {result.status for result in self.results.values()}
            if last or "regressed" in found or "inconclusive" not in found:
                break
        self.elapsed_s = self._clock() - self._start
        self._progress.done(f"{len(self.new_ms)} pairs, {self.looks} looks")

    def _planned_looks(self) -> list[int]:
        """Sizes that double up to what the time allows, in pairs."""
        elapsed = self._clock() - self._start
        affordable = int(len(self.new_ms) * self._max_time_s / max(elapsed, 1e-9))
        largest = max(FIRST_LOOK, min(MAX_PAIRS, affordable))
        sizes = {max(FIRST_LOOK, largest >> shift) for shift in range(LOOKS)}
        return sorted(sizes)

    def _collect(self, base: Runner, new: Runner, *, until: int) -> bool:
        """Time pairs until there are enough; False when the time was up before."""
        while len(self.new_ms) < until:
            if self._clock() - self._start >= self._max_time_s:
                return False
            base_ms, new_ms = interleave((base, new), rounds=2)
            self.base_ms += base_ms
            self.new_ms += new_ms
            self._progress.advance(2)
        return True

    def _look(self, last: bool) -> None:
        self.looks += 1
        new, base = np.asarray(self.new_ms), np.asarray(self.base_ms)
        self.interval = _interval(new, base, quantile=0.5, alpha=self.alpha)
        for rule in self._rules:
            if self.results.get(rule, _UNDECIDED).status == "inconclusive":
                self.results[rule] = self._judge(rule, new=new, base=base, last=last)

    def _judge(self, rule: Rule, *, new: np.ndarray, base: np.ndarray, last: bool) -> RuleResult:
        quantile = QUANTILES[rule.metric]
        interval = _interval(new, base, quantile=quantile, alpha=self.alpha)
        if interval is None:
            note = f"{len(new)} pairs are too few for {rule.metric}; allow more time (--max-time)"
            return RuleResult(str(rule), "inconclusive", note=note)
        allowed_ms = self._min_delta_ms / float(np.quantile(base, quantile))
        limit = math.log1p(max(rule.limit, allowed_ms))
        status: Status = "inconclusive"
        if interval.lower > limit:
            status = "regressed"
        elif interval.upper < limit:
            status = "pass"
        undecided = status == "inconclusive" and last
        return RuleResult(
            rule=str(rule),
            status=status,
            ratio=math.exp(interval.estimate),
            interval=(math.exp(interval.lower), math.exp(interval.upper)),
            limit_ratio=math.exp(limit),
            note="the limit lies inside the interval; allow more time" if undecided else "",
        )


_UNDECIDED = RuleResult("", "inconclusive")


def _interval(
    new: np.ndarray, base: np.ndarray, *, quantile: float, alpha: float
) -> Interval | None:
    """Interval of log(new / base) at a quantile; None where the pairs are too few.

    The median uses the paired log-ratios. Other quantiles are read per section of consecutive
    pairs, each long enough to have one sample beyond the quantile.
    """
    if len(new) < MIN_PAIRS:
        return None
    if quantile == 0.5:
        return log_ratio_interval(np.log(new) - np.log(base), alpha)
    fewest, most = _SECTIONS
    size = max(math.ceil(1 / (1 - quantile) - 1e-9), math.ceil(len(new) / most))
    count = len(new) // size
    if count < fewest:
        return None
    sections = np.stack([new[-count * size :], base[-count * size :]]).reshape(2, count, size)
    over = np.log(np.quantile(sections, quantile, axis=2))  # (2, count)
    return batch_interval(over[0] - over[1], alpha=alpha, batch_size=size)


def _compare_sizes(rule: Rule, *, new: Path, base: Path) -> RuleResult:
    ratio = bytes_of(graph_of(new)) / bytes_of(graph_of(base))
    limit = 1 + rule.limit
    status: Status = "regressed" if ratio > limit else "pass"
    return RuleResult(str(rule), status, ratio, (ratio, ratio), limit)


def _refuse_other_inputs(new: Path, base: Path) -> None:
    """Graphs of other inputs are other models, whose times say nothing about each other."""
    inputs = {artifact: inputs_of(graph_of(artifact)) for artifact in (new, base)}
    if inputs[new] != inputs[base]:
        told = [
            f"{artifact} takes {', '.join(f'{n} ({kind})' for n, kind in taken.items())}"
            for artifact, taken in inputs.items()
        ]
        raise UsageError(
            f"{' and '.join(told)}: they are not two versions of one model. Give a --baseline "
            "with the inputs of NEW."
        )


def _runner(
    artifact: Path, other: Path, manifests: Mapping[Path, Any], workload: Workload
) -> Runner:
    """The graph in the runtime it was compiled for; a mere file, in that of the other."""
    name = recorded_runtime(manifests.get(artifact, manifests.get(other, {})))
    local_device(name)
    return RUNNERS[name](graph_of(artifact), workload=workload)


def _percent(text: str, *, clause: str) -> float:
    try:
        value = float(text.removesuffix("%")) if text.endswith("%") else math.nan
    except ValueError:
        value = math.nan
    if not 0 < value < 1000:
        raise UsageError(
            f"Cannot read the limit of the rule {clause!r}: it is a percentage above 0, such as 5%."
        )
    return value / 100


def _overall(statuses: Any) -> Status:
    found = set(statuses)
    if "regressed" in found:
        return "regressed"
    return "inconclusive" if "inconclusive" in found else "pass"
