"""Whole models at chosen levels, and how far sums of prices are off of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy as np

from zipc.build import dense_model
from zipc.core.types import Level, Progress, Target
from zipc.latency_tables import correction
from zipc.latency_tables.surplus import Whole
from zipc.latency_tables.table import LatencyTable
from zipc.offered import float_widths, suits
from zipc.plain_edits import first_units, plain_edit
from zipc.prepare import Prepared
from zipc.prices import LEAST_RATIO, UNEXPLAINED, Evidence, Prices, SitePrices
from zipc.profiler.afresh import time_afresh
from zipc.profiler.device import GraphTimer
from zipc.pruner.graph.mixtures import settled
from zipc.targets import ON_CPU

CORRECTION_STEP = 6  # models that are measured at a time, or more where there are many
# How many at least, and at most where they do not agree; the second of those that load in no time:
# each may be off, and six agree by chance.
CORRECTION_POINTS = 6, 18
MANY_POINTS = 36, 144
AGREED, ALL_AGREED = 0.02, 0.05  # errors of left-out points, in the median and at worst, below
# which no more are measured
CLEARLY = 0.9  # of the mean error of left-out points: what leaving more unexplained must come below
CORRECTION_SECONDS = 90.0  # that all of them take at most, but where parts are cold
CORRECTION_ROUNDS = 6, 100  # of a whole model beside dense: as many as fit
CORRECTION_MS = 1000.0  # of each point; a round runs a model and the dense one twice. Loading one
# more tells more than as many rounds as it takes.
# A graph of 9 MB that comes back after others takes 30 % longer than it should in its second run
# and 1 % in its fifth: the last cache only keeps what was thrown out of the others.
UNTIMED = 1, 4
UNTIMED_MS = 6.0  # more than this much of it is not needed
DENSITIES = 0.15, 0.95  # of random allocations
MIXED = 0.3  # share of them whose sites have numerics of their own
R2 = 0.7548776662466927, 0.5698402909980532
TOO_MUCH = 1.5  # of the whole: by less, parts take more because each is a graph of its own


def overlapping(
    prepared: Prepared, sites: SitePrices, calls: Mapping[str, int], whole_ms: float
) -> bool:
    """Whether parts that sites are priced in overlap, so that what is in several counts for each.

    They do where sites share maps, as in a chain of convolutions, and where they take more together
    than the whole: the part of a layer that is called in several places may be nearly all of it.
    """
    maps = [m for s in prepared.structure.sites for m in s.maps]
    alone = sum(sites.alone_ms(name, sites.dense[name]) * count for name, count in calls.items())
    return len(maps) > len(set(maps)) or alone > TOO_MUCH * whole_ms


def fastest_widths(prepared: Prepared, target: Target, sites: SitePrices) -> dict[str, Level]:
    """Every site at the width above none that is fastest alone, in plain floats."""
    levels = {
        s.name: min(
            (Level(w) for w in float_widths(prepared, s, target) if w),
            key=partial(sites.alone_ms, s.name),
        )
        for s in prepared.structure.sites
    }
    return settled(prepared.sites, levels, first_units(levels))


def undiminished(prepared: Prepared) -> list[bytes]:
    """The dense model in floats, and the whole of what it runs in where that is another."""
    dense = dense_model(prepared)
    return [dense] if prepared.numeric == prepared.floats else [dense, whole_model(prepared, {})]


def whole_model(prepared: Prepared, levels: Mapping[str, Level]) -> bytes:
    """The whole model at some levels, with unrepaired weights."""
    edit = plain_edit(prepared, levels, first_units(levels))
    return prepared.deployed(prepared.dense, edit)


@dataclass(frozen=True, slots=True)
class WholePoint:
    """Times of a whole model at some levels, of the undiminished whole and of the dense model in
    floats, in turns."""

    levels: Mapping[str, Level]
    ms: Sequence[float]
    whole_ms: Sequence[float]
    floats_ms: Sequence[float]

    @property
    def measured(self) -> float:
        """Its latency relative to the undiminished whole."""
        return _ratio(self.ms, self.whole_ms)

    @property
    def over_floats(self) -> float:
        """Its latency relative to the dense model in floats."""
        return _ratio(self.ms, self.floats_ms)


def fit_correction(
    prepared: Prepared,
    target: Target,
    prices: Prices,
    beside: Sequence[bytes],
    open_timer: Callable[[], GraphTimer],
    progress: Progress,
    *,
    cold: bool,
) -> tuple[correction.Correction, list[WholePoint]]:
    """Measure whole models until they agree on what sums of prices get wrong, or are enough.

    They are timed `beside` the `undiminished`, each time at levels that are worth their prices by
    what is known so far: a level that noise made cheap is found out.
    """
    many = _loads_in_no_time(prices.table) and not cold
    least, most = MANY_POINTS if many else CORRECTION_POINTS
    progress.stage("check prices on whole models")
    rng, points = np.random.default_rng(0), list[WholePoint]()
    measure = partial(
        measure_points,
        *(prepared, prices.table, beside),
        open_timer=open_timer,
        rounds=as_fits(CORRECTION_MS / (4 * prices.dense_ms), *CORRECTION_ROUNDS),
        untimed=untimed_runs(prices.whole_ms),
        progress=progress,
    )
    known, started = prices, time.monotonic()
    while True:
        step = CORRECTION_STEP * max(1, len(points) // (4 * CORRECTION_STEP))  # fits take seconds
        numbers = range(len(points), min(len(points) + step, most))
        chosen = [spread_levels(prepared, target, known, number, rng) for number in numbers]
        points += measure(chosen)
        fitted = fit_points(prices, points, cold=cold)
        known = prices.corrected(fitted)
        agreed = fitted.median_error <= AGREED and fitted.worst_error <= ALL_AGREED
        spent = time.monotonic() - started
        late = spent * (1 + step / len(points)) > CORRECTION_SECONDS
        enough = (agreed and len(points) >= least) or late
        # Loaded again, a cold graph takes 3 % more or less: points may agree by chance.
        if (enough and not cold) or len(points) >= most:
            break
    progress.done(
        f"sum of prices off by {fitted.median_error:.1%} (median), {fitted.worst_error:.1%} (worst)"
    )
    return fitted, points


def fit_points(
    prices: Prices, points: Sequence[WholePoint], *, cold: bool
) -> correction.Correction:
    """What some models take beyond sums of prices, and how far off these are of each of them as
    the others tell.

    As much of them is left unexplained as predicts left-out ones best: where loads or neighbours
    move times by a tenth, what explains each model to a percent is noise.
    """
    evidence = prices.evidence()
    wholes = [prices.whole(point.levels, point.measured) for point in points]
    best, *others = (
        _fitted(prices, points, evidence, unexplained, wholes=wholes, cold=cold)
        for unexplained in UNEXPLAINED
    )
    for other in others:
        if fmean(other.errors) < CLEARLY * fmean(best.errors):
            best = other
    return best


def _fitted(
    prices: Prices,
    points: Sequence[WholePoint],
    evidence: Evidence,
    unexplained: float,
    *,
    wholes: Sequence[Whole],
    cold: bool,
) -> correction.Correction:
    def tell(wholes: Sequence[Whole]) -> Prices:
        return replace(prices, surplus=evidence.surplus(wholes, unexplained=unexplained))

    def read(told: Prices, some: Sequence[WholePoint]) -> list[correction.Point]:
        sums = [told.sum_ms(point.levels) / prices.whole_ms for point in some]
        ratios = [max(ratio, LEAST_RATIO) for ratio in sums]
        return list(zip(ratios, (point.measured for point in some), strict=True))

    told = tell(wholes)
    left_out = []
    for at in range(len(points)):
        by_others = tell([*wholes[:at], *wholes[at + 1 :]])
        (own,) = read(by_others, [points[at]])
        others = [*points[:at], *points[at + 1 :]] if cold else []  # none but a bend reads them
        left_out.append((own, read(by_others, others)))
    return correction.fit(read(told, points), left_out, surplus=told.surplus, may_bend=cold)


def measure_points(
    prepared: Prepared,
    table: LatencyTable,
    beside: Sequence[bytes],
    allocations: Sequence[Mapping[str, Level]],
    *,
    open_timer: Callable[[], GraphTimer],
    rounds: int,
    untimed: int = 1,
    progress: Progress,
) -> list[WholePoint]:
    """Time whole models `beside` the `undiminished`, few of them in any one process."""
    seen = time_afresh(
        [partial(whole_model, prepared, levels) for levels in allocations],
        beside,
        open_timer=open_timer,
        workload=table.workload,
        rounds=rounds,
        untimed=untimed,
        once=not _loads_in_no_time(table),
        on_graph=progress.advance,
    )
    return [
        WholePoint(levels, b.ms, b.others_ms[-1], b.others_ms[0])
        for levels, b in zip(allocations, seen, strict=True)
    ]


def _loads_in_no_time(table: LatencyTable) -> bool:
    """Whether one load of a model need not be all that is seen of it."""
    return table.runtime in ON_CPU and "host" not in table.fingerprint


def untimed_runs(whole_ms: float) -> int:
    """Runs of a whole model of so many milliseconds before each one that is timed."""
    return as_fits(UNTIMED_MS / whole_ms, *UNTIMED)


def _ratio(ms: Sequence[float], beside: Sequence[float]) -> float:
    return float(np.median(np.array(ms) / np.array(beside)))


def random_levels(
    prepared: Prepared, target: Target, prices: Prices, rng: np.random.Generator
) -> dict[str, Level]:
    """A random allocation: widths around a random overall density, one numeric policy."""
    return _levels(prepared, target, prices, rng.uniform(), rng.uniform(), rng)


def spread_levels(
    prepared: Prepared, target: Target, prices: Prices, number: int, rng: np.random.Generator
) -> dict[str, Level]:
    """One of a series of such allocations that has densities and policies in equal shares.

    They follow the sequence R2 (Roberts, 2018), which leaves no gaps however long it is.
    """
    overall, policy = ((0.5 + number * step) % 1 for step in R2)
    return _levels(prepared, target, prices, overall, policy, rng)


def _levels(
    prepared: Prepared,
    target: Target,
    prices: Prices,
    overall: float,
    policy_at: float,
    rng: np.random.Generator,
) -> dict[str, Level]:
    """Widths around a density, which `overall` in [0, 1) tells, and one numeric for all or mixed
    ones, which `policy_at` tells.

    Of widths that a search may choose: none that costs as much as a wider one.
    """
    least, most = DENSITIES
    density = least + (most - least) * overall
    mixed = list(target.numerics)
    index = int((policy_at - MIXED) / (1 - MIXED) * len(mixed))
    policy = mixed[index] if policy_at >= MIXED else None
    levels = {}
    for site in prepared.structure.sites:
        numeric = policy or mixed[int(rng.integers(len(mixed)))]
        whole = prepared.body is not None or numeric == prepared.floats
        plain = whole or not prepared.on_integers(site)
        choice: list[Level] = []
        for width in reversed(float_widths(prepared, site, target)):
            level = Level(width, numeric)
            if plain or not width or not suits(level, site, target):
                level = Level(width)
            if not choice or prices.ms(site.name, level) < prices.ms(site.name, choice[-1]):
                choice.append(level)
        wanted = float(np.clip(density + rng.normal(0, 0.2), 0, 1)) * site.units
        away = [abs(level.width - wanted) for level in choice]
        levels[site.name] = choice[int(np.argmin(away))]
    return settled(prepared.sites, levels, first_units(levels))


def as_fits(count: float, least: int, most: int) -> int:
    return max(least, min(most, int(count)))
