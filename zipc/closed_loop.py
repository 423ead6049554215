"""Solve, build, measure, correct the budget, solve again: the only way back in the pipeline."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from zipc.build import Built, build
from zipc.candidates import Candidates, weight_limit
from zipc.core.errors import TargetUnreachable
from zipc.core.files import fingerprint
from zipc.core.request import Request
from zipc.core.types import Allocation, Level, PairedTiming, Progress, Runner
from zipc.effort import Effort
from zipc.engines import engine_of, passed_over
from zipc.integer_choice import network_in_integers
from zipc.prepare import Prepared
from zipc.prices import Prices
from zipc.profiler.device import Device, GraphTimer, TimedGraph
from zipc.proof import paired_speedup, paired_timing
from zipc.pruner.allocate.search import Problem, SearchState, build_problem, search
from zipc.pruner.allocate.sensitivity import probe_count, site_losses
from zipc.pruner.graph.mixtures import nested
from zipc.repair import repaired
from zipc.shipped import Shipped
from zipc.stage_cache import StageCache
from zipc.turns import by_default

AIM = 1.03  # the lower end of the verdict's interval must clear the target, not its middle
ACCEPT = (1.02, 1.042)  # measured speedup over target at which the loop stops
EXACT_AIM, EXACT_ACCEPT = 1.01, (1.0, 1.02)  # the same of modelled speedups, which have no noise
STAGE, FILE = "solution", "solution.json"
JUDGED, LOSSES = "sensitivity", "losses.json"
NEAR = 0.9  # of a speedup that nobody was promised: a build below it is taken, before a far faster
# one that loses more
FILLED = 0.98  # finalists that leave more of the budget unused overshoot the speedup asked for
LOOKS = 3  # finalists that are built, best first, while they are too slow by no more than prices
# usually are off: for each in its own way
FINALISTS = 6  # judged on the confirming texts; half as many where the budget was only corrected
AGAIN = 0.15  # share of the search that is spent when only the budget was corrected
LOOK_PAIRS = (60, 120, 240)  # a look goes on while its interval is wider than LOOK_WIDTH
LOOK_SECONDS = 8.0  # and less than this was spent on it
LOOK_WIDTH = 0.012  # half-width of the log-ratio interval
TABLE_ERROR = 0.04  # how far a prediction is usually off: a look noisier than this counts for less
TOLL, MOST_TOLL = 0.2, 0.6  # share of the log-speedup that is usually, and at most, lost by default
LEAST_GAIN = 0.1  # log-speedup below which a share of it says nothing
SLACK = 1.015  # of AIM and ACCEPT, what is for the noise of the proof: under the default options
# no lower end has to meet the target, so that a smaller loss needs no more pruning


@dataclass(frozen=True, slots=True)
class Solution:
    """The allocation the loop settled on, and how it got there."""

    allocation: Allocation
    predicted_ratio: float  # latency relative to dense, from the table alone
    loss: float  # oracle on the confirming texts, before the repair
    unreachable: str | None
    looks: tuple[tuple[float, float], ...]  # (predicted, measured) speedup of each build
    searched: int  # candidates scored
    measured: float | None = None  # the speedup it was seen at

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Solution:
        held = dict(document["allocation"])
        levels = {n: Level(**lv) for n, lv in held.pop("levels").items()}
        looks = tuple((float(p), float(m)) for p, m in document["looks"])
        fields = {**document, "allocation": Allocation(levels, **held), "looks": looks}
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Found:
    """The artifact chosen by the loop and how it was predicted."""

    solution: Solution
    built: Built


@dataclass(slots=True)
class _Attempt:
    allocation: Allocation
    speedup: float
    width: float  # half-width of the interval of log(speedup)
    predicted_ratio: float
    loss: float
    toll: float = 0.0  # log of the speedup over that under default options
    toll_width: float = math.inf  # half-width of its interval; infinite where it was not measured
    repriced: bool = False  # some of its levels gain less than their prices said


def make_problem(
    prepared: Prepared,
    prices: Prices,
    candidates: Candidates,
    request: Request,
    cache: StageCache,
    progress: Progress,
) -> Problem:
    """Price and judge every level of every site alone; judged before, it is not judged again."""
    progress.stage("sensitivity", probe_count(candidates.ladders))
    offered = {n: [str(r.level) for r in ld.rungs] for n, ld in candidates.ladders.items()}
    rounding = weight_limit(prices.table.fingerprint)
    asked = [request.effort, request.metric, request.evaluator, rounding]
    key = fingerprint(candidates.weights_key, sorted(offered.items()), asked)
    folder = cache.get(JUDGED, key)
    if folder is not None:
        held = json.loads((folder / LOSSES).read_text())
        losses = {n: {Level(**lv): loss for lv, loss in pairs} for n, pairs in held.items()}
        progress.done("reused")
    else:
        candidates.scorer.rebase_on_dense()
        losses = site_losses(
            prepared.sites,
            candidates.ladders,
            score=candidates.scorer.score,
            on_probe=lambda: progress.advance(),
        )
        pairs = {
            n: [[dataclasses.asdict(lv), loss] for lv, loss in found.items()]
            for n, found in losses.items()
        }
        cache.put(JUDGED, key, {LOSSES: json.dumps(pairs).encode()})
        progress.done()
    sites = prepared.structure.sites
    return build_problem(
        candidates.ladders,
        losses,
        fixed_ms=prices.fixed_ms,
        dense_ms=prices.dense_ms,
        nested={s.name: nested(s, sites) for s in sites if s.experts},
    )


def choose(
    problem: Problem,
    prices: Prices,
    candidates: Candidates,
    *,
    ratio: float,
    trials: int,
    seconds: float,
    finalists: int,
    rng: np.random.Generator,
    progress: Progress,
    state: SearchState | None = None,
) -> tuple[list[tuple[Allocation, float]], SearchState]:
    """Search at a latency ratio to dense, then judge `finalists` on more texts; best first.

    Raises:
        TargetUnreachable: no allocation is predicted to reach the ratio; carries the best speedup.
    """
    progress.stage("search", trials)
    scorer = candidates.scorer
    try:
        found = search(
            problem,
            budget_ms=prices.budget_ms(ratio),
            score=scorer.score,
            adopt=lambda a: void(scorer.score(a, keep=True)),
            trials=trials,
            seconds=seconds,
            rng=rng,
            progress=progress,
            state=state,
        )
    except TargetUnreachable as error:  # it knows sums of prices only, not what they come out at
        best = 1 / prices.ratio(problem.fastest_ms)
        raise TargetUnreachable(
            "No allocation is predicted to be fast enough: with everything removed that "
            f"can be removed the model takes {prices.dense_ms / best:.2f} ms, "
            f"a speedup of {best:.2f}x.",
            best_speedup=best,
        ) from error
    top = [(problem.allocation(c), c) for _, c in found.top]
    least = FILLED * prices.budget_ms(ratio)
    filled = ([f for f in top if f[0].predicted_ms >= least] or top)[:finalists]
    judged = sorted((candidates.confirm.score(a), i) for i, (a, _) in enumerate(filled))
    loss, best = judged[0]
    found.chosen = list(filled[best][1])
    progress.done(f"{found.trials} candidates, oracle {loss:.5f}")
    return [(filled[i][0], loss) for loss, i in judged], found


def _bias(attempts: Sequence[_Attempt]) -> float:
    """By how much predictions are too high near this budget: predicted over measured ratio."""
    logs = [math.log(a.predicted_ratio * a.speedup) for a in attempts]
    return math.exp(_drawn(logs, [a.width for a in attempts], usual=TABLE_ERROR))


def _toll(attempts: Sequence[_Attempt], target: float) -> float:
    """How many times faster than promised an artifact must be, for the promise of `target` to hold
    under the default options as well: a small model makes less of many threads than its dense one.

    What is lost grows with the speedup: looks agree on its share of the log-speedup.
    """
    gains = [max(math.log(a.speedup), LEAST_GAIN) for a in attempts]
    shares = [a.toll / gain for a, gain in zip(attempts, gains, strict=True)]
    widths = [a.toll_width / gain for a, gain in zip(attempts, gains, strict=True)]
    share = min(max(_drawn(shares, widths, usual=TOLL), 0.0), MOST_TOLL)
    return math.exp(math.log(target) * share / (1 - share))


def _drawn(values: Sequence[float], widths: Sequence[float], *, usual: float) -> float:
    """The mean over all looks so far, drawn towards 0 as far as they are noisier than what is
    looked for usually is large."""
    trust = [usual**2 / (usual**2 + width**2) for width in widths]
    weighted = sum(t * x for t, x in zip(trust, values, strict=True))
    return weighted / (sum(trust) + 0.1)


def _half_width(timing: PairedTiming) -> float:
    """Of the interval of log(speedup)."""
    return math.log(timing.ci95[1] / timing.ci95[0]) / 2


def _look(reference: Runner, candidate: Runner) -> PairedTiming:
    """Measure until the interval is narrow enough, or the last allowance is spent."""
    base: list[float] = []
    times: list[float] = []
    started = time.monotonic()
    for pairs in LOOK_PAIRS:
        more = paired_speedup(reference, candidate, pairs=pairs - len(base))
        base += more.reference_ms
        times += more.candidate_ms
        timing = paired_timing(base, times)
        if _half_width(timing) <= LOOK_WIDTH or time.monotonic() - started > LOOK_SECONDS:
            break
    return timing


def void(_: object) -> None:
    """Drop a value where a callback must not return one."""


class ClosedLoop:
    """Searches, builds and measures until an artifact is as fast as asked.

    `deployed` gives what a build is timed by, `dense` is the graph it is timed beside.
    Asked again, it goes on from what it has learnt about the model and the machine.
    """

    def __init__(
        self,
        prepared: Prepared,
        prices: Prices,
        candidates: Candidates,
        request: Request,
        *,
        device: Device,
        dense: bytes,
        deployed: Callable[[Built], Shipped],
        effort: Effort,
        cache: StageCache,
        progress: Progress,
    ) -> None:
        self.prepared = prepared
        self.prices = prices
        self.candidates = candidates
        self.request = request
        self.device = device
        self.dense = dense
        self.deployed = deployed
        self.timer: GraphTimer = device.timer()
        self.reference: TimedGraph = self.timer.load(dense, workload=request.workload)
        self.effort = effort
        self.cache = cache
        self.progress = progress
        self.attempts: list[_Attempt] = []
        self.looks: list[tuple[float, float]] = []
        self.searched = 0
        self.state: SearchState | None = None
        self.rng = np.random.default_rng(request.seed)
        exact = prices.doubt is not None
        self.aim, self.accept = (EXACT_AIM, EXACT_ACCEPT) if exact else (AIM, ACCEPT)

    @cached_property
    def problem(self) -> Problem:
        """Every level of every site, priced and judged alone."""
        return make_problem(
            self.prepared,
            self.prices,
            self.candidates,
            self.request,
            self.cache,
            self.progress,
        )

    def key(self, target: float | None) -> str:
        """What a solution depends on: the evidence, the table and the goal."""
        table, asked = self.prices.table.model_dump(mode="json"), self.request
        goal = [asked.speedup, asked.latency_ms, asked.prune, asked.numerics, asked.pattern]
        goal += [] if asked.max_drop is None else [target]
        how = [asked.effort, asked.metric, asked.evaluator, asked.quantizer, asked.by_default]
        return fingerprint(self.candidates.weights_key, table, goal, *how)

    def find(self, target: float | None) -> Found:
        """The best allocation that measures at least `target`, with its final weights.

        None asks for the fastest numerics without pruning (of a network that is in INT8 as a whole,
        with exact sums where those lose less). A solution found by an earlier run of
        the same request is taken from the cache.
        """
        folder = self.cache.get(STAGE, self.key(target))
        if folder is not None:
            self.progress.stage("search")
            solution = Solution.of_json(json.loads((folder / FILE).read_text()))
            self.progress.done("reused")
        else:
            solution = self.solve(target)
            self.cache.put(STAGE, self.key(target), {FILE: json.dumps(solution.to_json()).encode()})
        built = repaired(
            self.prepared, self.candidates, solution.allocation, self.request, self.progress
        )
        if self.prepared.body is not None:
            built = network_in_integers(
                self.prepared,
                self.prepared.body,
                self.candidates,
                built,
                workload=self.request.workload,
                fast_enough=lambda model: self._fast_enough(model, target),
                progress=self.progress,
            )
        return Found(solution, built)

    def _fast_enough(self, model: bytes, target: float | None) -> bool:
        """Whether a finished graph measures as fast as asked, under the default options as well."""
        if target is None:
            return True
        runner = self.timer.load(model, workload=self.request.workload)
        timings: list[PairedTiming | None] = [_look(self.reference, runner)]
        if self.request.by_default:
            timings.append(self.by_default(model, enough=target * self.accept[0]))
        return all(t is None or t.speedup >= target * self.accept[0] for t in timings)

    def forget(self, target: float | None) -> None:
        """Search anew next time: the verdict on this solution was not what was asked for."""
        self.cache.drop(STAGE, self.key(target))

    def solve(self, target: float | None) -> Solution:
        """The best allocation at a speedup; where it cannot be had, or none is asked for, the
        fastest one."""
        if target is None:
            return self.solution(self.attempt(self.fastest()))
        whole = self.numerics_alone()
        ratio = self.prices.ratio(whole.predicted_ms) * target
        alone = self.prepared.body is not None  # INT8 alone may do, and nothing loses less
        if ratio <= 1 and (alone or ratio * self.aim > 1):  # the search aims higher than that
            attempt = self.attempt(whole)
            if alone and attempt.speedup >= self.least(target):
                return self.solution(attempt)
        try:
            return self.run(target)
        except TargetUnreachable as error:
            self.progress.info(f"{error} Building the fastest artifact there is.")
            fastest = self.attempt(self.fastest())
            if fastest.speedup < self.least(target):
                return self.solution(fastest, unreachable=str(error))
        try:  # it measures faster than predicted: some of it can be given back
            return self.run(target)
        except TargetUnreachable:
            return self.solution(fastest)

    def run(self, target: float) -> Solution:
        """Search, build and look until a look is close."""
        for _ in range(self.effort.rounds):
            first = self.state is None
            share = 1.0 if first else AGAIN
            finalists, self.state = choose(
                self.problem,
                self.prices,
                self.candidates,
                ratio=_bias(self.attempts) / (self.aim * self.needed(target)),
                trials=int(self.effort.trials * share),
                seconds=self.effort.search_seconds * share,
                finalists=FINALISTS if first else FINALISTS // 2,
                rng=self.rng,
                progress=self.progress,
                state=self.state,
            )
            self.searched += self.state.trials
            attempt = self.best_of(finalists, target)
            if attempt.repriced:
                continue
            over = attempt.speedup / self.needed(target)
            if self.accept[0] <= over <= self.accept[1]:
                break
            if over > self.accept[1] and attempt.allocation.undiminished(self.prepared.sites):
                break  # nothing is left to give back
        least = self.least(target) * (1.0 if self.request.max_drop is None else NEAR)
        good = [a for a in self.attempts if a.speedup >= least]
        fastest = max(self.attempts, key=lambda a: a.speedup)
        best = min(good, key=lambda a: a.loss, default=fastest)
        return self.solution(best)

    def best_of(self, finalists: Sequence[tuple[Allocation, float]], target: float) -> _Attempt:
        """The first of some finalists that is not too slow by as little as prices are off; of more
        than `LOOKS` the last one that is looked at."""
        for allocation, loss in finalists[:LOOKS]:
            attempt = self.attempt(allocation, loss, worth=self.least(target))
            over = attempt.speedup / self.needed(target)
            close = over < self.accept[0] <= over * (1 + TABLE_ERROR)
            if attempt.repriced or not close:
                break
        return attempt

    def needed(self, target: float) -> float:
        """The speedup by which a promise of `target` holds under the default options as well."""
        return target * max(1.0, _toll(self.attempts, target) / SLACK)

    def least(self, target: float) -> float:
        """The speedup that an artifact must measure, for a promise of `target`."""
        return self.accept[0] * self.needed(target)

    def fastest(self) -> Allocation:
        """The fastest level of every site."""
        return self.problem.allocation([int(t.argmin()) for t in self.problem.times])

    def numerics_alone(self) -> Allocation:
        """Every unit of every site, in the fastest numeric; dense where that is offered."""

        def place(levels: Sequence[Level], times: np.ndarray) -> int:
            whole = max(level.width for level in levels)
            held = [i for i, level in enumerate(levels) if level.width == whole]
            return min(held, key=lambda i: (levels[i].pattern != "dense", float(times[i])))

        pairs = zip(self.problem.levels, self.problem.times, strict=True)
        return self.problem.allocation([place(*pair) for pair in pairs])

    def attempt(
        self, allocation: Allocation, loss: float | None = None, *, worth: float = 0.0
    ) -> _Attempt:
        """Build and time an allocation; under default options too if it is `worth` it, being as
        fast as that with one thread."""
        self.progress.stage("build and look")
        states = self.candidates.levels.states(allocation)
        built = build(self.prepared, allocation, states, workload=self.request.workload)
        shipped = self.deployed(built)
        runner = self.timer.load(shipped.model, workload=self.request.workload)
        timing = _look(self.reference, runner)
        ratio = self.prices.ratio(allocation.predicted_ms)
        self.looks.append((1 / ratio, timing.speedup))
        self.progress.done(
            f"predicted {1 / ratio:.2f}x, {self.prices.table.kind} {timing.speedup:.2f}x"
        )
        if loss is None:
            loss = self.candidates.confirm.score(allocation)
        attempt = _Attempt(allocation, timing.speedup, _half_width(timing), ratio, loss)
        free = None
        if self.request.by_default and timing.speedup >= worth:
            free = self.by_default(shipped.model, enough=timing.speedup ** (1 - TOLL))
        if free is not None:
            attempt.toll = math.log(timing.speedup / free.speedup)
            attempt.toll_width = _half_width(free)
        attempt.repriced = self._repriced(built, shipped, runner)
        self.attempts.append(attempt)
        return attempt

    def _repriced(self, built: Built, shipped: Shipped, runner: Runner) -> bool:
        """Whether an engine passes sparse kernels over that prices count on; they do no more."""
        engine = engine_of(runner, shipped) if built.sparse_weights else None
        if engine is None:
            return False
        sites = passed_over(engine, built, shipped, self.prepared.structure.sites)
        changed = [name for name in sites if self.problem.gains_nothing_(name)]
        if changed:
            told = f"the engine has no sparse kernels at {len(changed)} sites in 2:4: they cost"
            self.progress.info(f"{told} what dense ones do from now on")
        return bool(changed)

    def by_default(self, model: bytes, *, enough: float) -> PairedTiming | None:
        """A graph against the dense one under the runtime's default options, where it can be timed
        with more than one thread.

        Where that is less than `enough`, it is timed once more and the better of both counts: other
        programs only ever slow the threads of a graph down, those of a small one most.
        """
        if self.device.kind != "measured":
            return None
        graphs, workload = [self.dense, model], self.request.workload
        first = by_default(self.device, graphs, workload, self.progress)
        if first is None or not self.request.by_default or first.speedup >= enough:
            return first  # fast enough, or no more than told
        again = by_default(self.device, graphs, workload, self.progress)
        return max((t for t in (first, again) if t is not None), key=lambda t: t.speedup)

    def solution(self, attempt: _Attempt, *, unreachable: str | None = None) -> Solution:
        return Solution(
            attempt.allocation,
            attempt.predicted_ratio,
            attempt.loss,
            unreachable,
            tuple(self.looks),
            self.searched,
            attempt.speedup,
        )
