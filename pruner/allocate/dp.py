"""The allocator's exact core: one level per site, least cost, under a latency budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class BudgetTooSmall(ValueError):
    """Even the fastest level of every site takes longer; `minimum` is that time."""

    def __init__(self, minimum: float, budget: float) -> None:
        super().__init__(f"the fastest allocation takes {minimum:.6g}, the budget is {budget:.6g}")
        self.minimum = minimum


def solve(
    costs: Sequence[np.ndarray],
    times: Sequence[np.ndarray],
    *,
    budget: float,
    buckets: int = 4000,
) -> list[int]:
    """Pick one level index per site: the sum of costs minimal, the sum of times within `budget`.

    A dynamic program over `buckets` slices of the time left above the fastest allocation (Frantar &
    Alistarh 2022, SPDY, but rounding up): no result is ever over the budget, and none
    is worse than the true optimum for a budget smaller by one bucket per site. An infinite cost
    forbids a level; ties go to the faster level, then to the lower index.

    Raises:
        BudgetTooSmall: no choice fits; carries the least possible time.
    """
    sites = [_Site(c, t) for c, t in zip(costs, times, strict=True)]
    slack = budget - sum(site.fastest for site in sites)
    tolerance = 1e-12 * max(1.0, abs(budget))
    if not slack >= -tolerance:
        raise BudgetTooSmall(sum(site.fastest for site in sites), budget)
    cheapest = [len(site.costs) - 1 for site in sites]  # costs fall as times rise
    if _spent(sites, cheapest) <= slack + tolerance:
        return [int(s.indices[p]) for s, p in zip(sites, cheapest, strict=True)]
    chosen = _improve(sites, _search(sites, max(slack, 0.0), buckets), slack + tolerance)
    return [int(site.indices[place]) for site, place in zip(sites, chosen, strict=True)]


def pareto(times: np.ndarray, costs: np.ndarray) -> NDArray[np.intp]:
    """Return the indices of the levels worth offering, fastest first, each cheaper than the last.

    Dropped is whatever is no faster and no cheaper than another; of equals the first stays.
    """
    times, costs = np.asarray(times, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    by_time = np.lexsort((np.arange(len(times)), costs, times))
    best = np.minimum.accumulate(costs[by_time])
    improves = np.ones(len(by_time), dtype=bool)
    improves[1:] = best[1:] < best[:-1]
    return by_time[improves]


class _Site:
    """The non-dominated levels of one site, their times counted from the fastest."""

    def __init__(self, costs: np.ndarray, times: np.ndarray) -> None:
        costs, times = np.asarray(costs, dtype=np.float64), np.asarray(times, dtype=np.float64)
        if costs.shape != times.shape or costs.ndim != 1:
            raise ValueError(f"costs {costs.shape} and times {times.shape} do not match")
        if np.isnan(costs).any() or not np.isfinite(times).all():
            raise ValueError("a cost is NaN or a time is not finite")
        allowed = np.flatnonzero(costs < np.inf)
        if not len(allowed):
            raise ValueError("a site has no level to choose from")
        self.indices = allowed[pareto(times[allowed], costs[allowed])]
        self.costs: Floats = costs[self.indices]
        self.fastest = float(times[self.indices[0]])
        self.extra: Floats = times[self.indices] - self.fastest


def _search(sites: Sequence[_Site], slack: float, buckets: int) -> list[int]:
    """Places within each site's levels; `best[i][b]`: least cost of sites < i in b buckets."""
    steps = [_buckets_taken(site.extra, slack, buckets) for site in sites]
    best = [np.zeros(buckets + 1)]
    candidate = np.empty(buckets + 1)
    for site, taken in zip(sites, steps, strict=True):
        table = best[-1] + site.costs[0]
        for cost, step in zip(site.costs[1:], taken[1:], strict=True):
            if step > buckets:
                break
            view = candidate[step:]
            np.add(best[-1][: buckets + 1 - step], cost, out=view)
            np.minimum(table[step:], view, out=table[step:])
        best.append(table)
    left, chosen = buckets, []
    for before, site, taken in zip(
        reversed(best[:-1]), reversed(sites), reversed(steps), strict=True
    ):
        fits = taken <= left
        place = int(np.argmin(before[left - taken[fits]] + site.costs[fits]))
        left -= int(taken[place])
        chosen.append(place)
    return chosen[::-1]


def _buckets_taken(extra: Floats, slack: float, buckets: int) -> NDArray[np.int64]:
    """Round up to buckets; what does not fit at all takes one more than there are."""
    share = np.minimum(extra, slack) / slack if slack > 0 else np.zeros_like(extra)
    taken = np.ceil(share * buckets * (1 - 1e-12)).astype(np.int64)
    return np.where(extra > slack * (1 + 1e-12), buckets + 1, taken)


def _improve(sites: Sequence[_Site], chosen: list[int], slack: float) -> list[int]:
    """Spend what rounding up left over: the best single step that fits, until none does."""
    chosen = list(chosen)
    while True:
        left = slack - _spent(sites, chosen)
        best: tuple[float, int, int] | None = None
        for index, (site, place) in enumerate(zip(sites, chosen, strict=True)):
            reach = int(np.searchsorted(site.extra, site.extra[place] + left, side="right")) - 1
            if reach > place:
                gain = float(site.costs[place] - site.costs[reach])
                if best is None or gain > best[0]:
                    best = (gain, index, reach)
        if best is None:
            return chosen
        trial = list(chosen)
        trial[best[1]] = best[2]
        if _spent(sites, trial) > slack:
            return chosen
        chosen = trial


def _spent(sites: Sequence[_Site], chosen: Sequence[int]) -> float:
    return sum(float(site.extra[place]) for site, place in zip(sites, chosen, strict=True))
