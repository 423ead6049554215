"""Choose one level per site: an exact program over priced levels, steered by the oracle.

The program needs one number per level. It is the oracle's loss of that site alone, measured at a
few widths and interpolated along the ladder's error curve, so that removed units and rounded
weights stand on one scale. What the sum over sites gets wrong is learnt: a multiplier per site
(SPDY, arXiv:2201.13096) and swaps between sites are kept whenever the oracle says they help.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from zipc.core.errors import TargetUnreachable
from zipc.core.types import Allocation, Ladder, Level, Progress
from zipc.pruner.allocate.dp import BudgetTooSmall, solve

Floats = NDArray[np.float64]
Score = Callable[[Allocation], float]


@dataclass(slots=True)
class Problem:
    """Sites with their levels, prices and losses; `fixed_ms` is what no site can change.

    `idle` names, by level of a site, the sites inside of what that level removes: they stay dense,
    and save nothing.
    """

    names: list[str]
    levels: list[list[Level]]
    times: list[Floats]
    losses: list[Floats]
    fixed_ms: float
    dense_ms: float
    idle: Mapping[tuple[int, int], frozenset[int]] = field(default_factory=dict)

    def idle_at(self, chosen: Sequence[int]) -> set[int]:
        """Sites inside of what an allocation removes elsewhere."""
        return (
            {i for at in enumerate(chosen) for i in self.idle.get(at, ())} if self.idle else set()
        )

    def gains_nothing_(self, name: str) -> bool:
        """Price the 2:4 levels of a site as the same ones without; whether that changes a price."""
        site = self.names.index(name)
        levels, times = self.levels[site], self.times[site]
        before = times.copy()
        for at, level in enumerate(levels):
            plain = level.without("2:4")
            if plain != level and plain in levels:
                times[at] = max(times[at], times[levels.index(plain)])
        return bool((times != before).any())

    def settled(self, chosen: Sequence[int]) -> list[int]:
        """The same with sites that are idle dense."""
        idle = self.idle_at(chosen)
        return [len(self.levels[s]) - 1 if s in idle else i for s, i in enumerate(chosen)]

    def spent(self, chosen: Sequence[int]) -> float:
        """Milliseconds that the sites take."""
        return sum(float(t[i]) for t, i in zip(self.times, chosen, strict=True))

    def allocation(self, chosen: Sequence[int]) -> Allocation:
        chosen = self.settled(chosen)
        ms = self.fixed_ms + self.spent(chosen)
        loss = sum(float(c[i]) for c, i in zip(self.losses, chosen, strict=True))
        picked = {n: ls[i] for n, ls, i in zip(self.names, self.levels, chosen, strict=True)}
        return Allocation(picked, ms, loss)

    @property
    def fastest_ms(self) -> float:
        return self.allocation([int(t.argmin()) for t in self.times]).predicted_ms


@dataclass(slots=True)
class SearchState:
    """What a search learnt; handed to the next one when the budget moves."""

    chosen: list[int]
    loss: float
    log_weights: Floats
    trials: int = 0
    top: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)


def build_problem(
    ladders: Mapping[str, Ladder],
    losses: Mapping[str, Mapping[Level, float]],
    *,
    fixed_ms: float,
    dense_ms: float,
    nested: Mapping[str, Sequence[Sequence[str]]] = MappingProxyType({}),
) -> Problem:
    """Drop levels that are slower and worse than another; keep the rest in order of time.

    `nested` names the sites inside of each unit of a site.
    """
    names, levels, times, costs = [], [], [], []
    for name, ladder in ladders.items():
        rungs = sorted(ladder.rungs, key=lambda r: (r.ms, losses[name][r.level]))
        kept, best = [], float("inf")
        for rung in rungs:
            loss = losses[name][rung.level]
            if loss < best:
                kept.append(rung)
                best = loss
        names.append(name)
        levels.append([r.level for r in kept])
        times.append(np.array([r.ms for r in kept]))
        costs.append(np.array([losses[name][r.level] for r in kept]))
    idle = {}
    for name, inside in nested.items():
        at = names.index(name)
        for i, level in enumerate(levels[at]):
            gone = set(range(len(inside))) - set(ladders[name].kept(level.width))
            idle[at, i] = frozenset(names.index(n) for unit in gone for n in inside[unit])
    return Problem(names, levels, times, costs, fixed_ms, dense_ms, idle)


def search(
    problem: Problem,
    *,
    budget_ms: float,
    score: Score,
    adopt: Callable[[Allocation], None],
    trials: int,
    seconds: float,
    rng: np.random.Generator,
    progress: Progress,
    state: SearchState | None = None,
) -> SearchState:
    """Minimise the oracle over allocations predicted to take at most `budget_ms`.

    `adopt` is told of every new incumbent. `state` continues an earlier search. Stops after
    `trials` candidates or `seconds`, whichever comes first.

    Raises:
        TargetUnreachable: even the fastest level everywhere is over the budget.
    """
    budget = budget_ms - problem.fixed_ms
    weights = np.zeros(len(problem.names)) if state is None else state.log_weights

    def program(log_weights: Floats) -> list[int]:
        costs = [c * np.exp(w) for c, w in zip(problem.losses, log_weights, strict=True)]
        found = _fit(problem, solve(costs, problem.times, budget=budget), budget)
        if found is None:  # it counted on what idle sites would save: do without those
            for (site, level), idle in problem.idle.items():
                costs[site][level] = np.inf if idle else costs[site][level]
            found = solve(costs, problem.times, budget=budget)
        return found

    try:
        chosen = program(weights)
    except BudgetTooSmall as error:
        best = problem.dense_ms / problem.fastest_ms
        raise TargetUnreachable(
            f"No allocation takes {budget_ms:.2f} ms: with everything removed that can be removed "
            f"the model takes {problem.fastest_ms:.2f} ms, a speedup of {best:.2f}x.",
            best_speedup=best,
        ) from error
    current = SearchState(list(chosen), score(problem.allocation(chosen)), weights)
    if state is not None:
        repaired = _fit(problem, state.chosen, budget)
        if repaired is not None:
            loss = score(problem.allocation(repaired))
            if loss < current.loss:
                current = SearchState(repaired, loss, weights)
    adopt(problem.allocation(current.chosen))
    pool: dict[tuple[int, ...], float] = {tuple(current.chosen): current.loss}
    started = time.monotonic()
    tried, idle = 0, 0
    while tried < trials and time.monotonic() - started < seconds and idle < 200:
        if rng.random() < (0.6 if tried < trials // 3 else 0.25):
            noise = rng.normal(0.0, 0.6, len(weights)) * (rng.random(len(weights)) < 0.35)
            proposal, candidate = current.log_weights + noise, None
            with suppress(BudgetTooSmall):
                candidate = program(proposal)
        else:
            proposal = current.log_weights
            candidate = _swap(problem, current.chosen, budget, rng)
        if candidate is None or tuple(candidate) in pool:
            idle += 1
            continue
        idle = 0
        tried += 1
        loss = score(problem.allocation(candidate))
        pool[tuple(candidate)] = loss
        improved = loss < current.loss
        progress.advance(1, f"oracle {min(loss, current.loss):.5f}")
        if improved:
            current = SearchState(list(candidate), loss, proposal)
            adopt(problem.allocation(current.chosen))
    current.trials = tried
    current.top = sorted((loss, c) for c, loss in pool.items())[:12]
    return current


def _fit(problem: Problem, chosen: Sequence[int], budget: float) -> list[int] | None:
    """Bring an allocation under the budget by the steps that cost least per millisecond."""
    picked = problem.settled(chosen)
    while problem.spent(picked) > budget + 1e-12:
        best, best_rate, idle = None, float("inf"), problem.idle_at(picked)
        for s, i in enumerate(picked):
            if i == 0 or s in idle:
                continue
            gain = float(problem.times[s][i] - problem.times[s][i - 1])
            rate = float(problem.losses[s][i - 1] - problem.losses[s][i]) / max(gain, 1e-9)
            if rate < best_rate:
                best, best_rate = s, rate
        if best is None:
            return None
        picked[best] -= 1
        picked = problem.settled(picked)
    return picked


def _swap(
    problem: Problem, chosen: Sequence[int], budget: float, rng: np.random.Generator
) -> list[int] | None:
    """Move one site down or up at random and let one or two others take up the difference."""
    picked = list(chosen)
    count = len(picked)
    if count < 2:
        return None
    first = int(rng.integers(count))
    reach = max(1, len(problem.levels[first]) // 4)
    step = int(rng.integers(1, reach + 1)) * (1 if rng.random() < 0.5 else -1)
    if rng.random() < 0.1:  # a long jump: any level of the site
        step = int(rng.integers(len(problem.levels[first]))) - picked[first]
    target = int(np.clip(picked[first] + step, 0, len(problem.levels[first]) - 1))
    if target == picked[first]:
        return None
    picked[first] = target
    others = rng.permutation([i for i in range(count) if i != first])[: int(rng.integers(1, 3))]
    spent = problem.spent(picked)
    for s in others:
        left = budget - (spent - float(problem.times[s][picked[s]]))
        best = int(np.searchsorted(problem.times[s], left + 1e-12, side="right")) - 1
        if best < 0:
            spent += float(problem.times[s][0] - problem.times[s][picked[s]])
            picked[s] = 0
            continue
        spent += float(problem.times[s][best] - problem.times[s][picked[s]])
        picked[s] = best
    picked = problem.settled(picked)
    return picked if problem.spent(picked) <= budget + 1e-12 else None
