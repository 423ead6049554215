"""What prices mean for a whole model: of each level of each site, and of a sum of them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from zipc.core.types import Difference, Level
from zipc.latency_tables.correction import Correction
from zipc.latency_tables.modelled import Doubt
from zipc.latency_tables.surplus import Terms, Whole, beyond_ms, fit
from zipc.latency_tables.table import LatencyTable

MIN_SHARE = 0.05
LEAST_RATIO = 0.01  # of a sum to the whole: where parts overlap, what they save can add up to more
SURE = 0.005  # no ratio of two whole models is believed to be known better
UNEXPLAINED = 0.02, 0.05, 0.12  # of what a whole model takes, as standard deviations: what no sum
# over its parts tells, on machines that are quieter or busier
# What parts likely take in the whole beyond what they take alone, as standard deviations. Of the
# part: all of a kind in a numeric, the same at a knot of their widths, and those of one signature
# there (of few models a knot that may differ much looks cheap by chance); and all of a numeric. Of
# the mean part: each that is there. Of the whole: what no part has.
KIND, KNOT, OWN, SCALED, EACH, FIXED = 0.3, 0.1, 0.03, 0.1, 0.02, 0.1


@dataclass(frozen=True, slots=True)
class SitePrices:
    """What one call of each site takes alone, in a graph of its own."""

    table: LatencyTable
    signatures: Mapping[str, str]  # site -> signature in the table
    dense: Mapping[str, Level]
    numeric: str  # of the whole network, which a level in fp32 means too

    def alone_ms(self, site: str, level: Level) -> float:
        return self.table.price(self.signatures[site], level.within(self.numeric))

    def dense_ms(self, site: str) -> float:
        return self.alone_ms(site, self.dense[site])

    def saved_ms(self, site: str, level: Level) -> float:
        return self.dense_ms(site) - self.alone_ms(site, level)

    def near(self, site: str, level: Level) -> dict[str, float]:
        """By terms of the knots that a level lies between, how much of each is in it.

        Of a knot of its own signature, how near it is; of the like knots of all sites of its kind
        and of all of their widths, how much of what it takes alone.
        """
        level, signature = level.within(self.numeric), self.signatures[site]
        knots = self.table.knots(signature, level)
        at = min(bisect_left(knots, level.width), len(knots) - 1)
        low, high = knots[max(at - 1, 0)], knots[at]
        share = (level.width - low) / (high - low) if low < high else 1.0
        terms = {_name_of_kind(signature, level): self.table.price(signature, level)}
        for width, near in {low: 1 - share, high: share}.items():
            knot = replace(level, width=width)
            own, alike = _names_of_knot(signature, knot, knots)
            terms |= {own: near, alike: near * self.table.price(signature, knot)}
        return terms


def _name_of_kind(signature: str, level: Level) -> str:
    """The term of all sites of a kind at all widths of a numeric and a pattern, or removed."""
    return f"{signature.partition('-')[0]} {replace(level, width=int(level.width > 0))}"


def _names_of_knot(signature: str, level: Level, knots: Sequence[int]) -> tuple[str, str]:
    """The terms of a level at a knot: of its signature, and of all sites of its kind."""
    place = "one" if len(knots) == 1 else f"{knots.index(level.width) + 1} of {len(knots)}"
    return f"{signature} {level}", f"{_name_of_kind(signature, level)}, {place}"


@dataclass(frozen=True, slots=True)
class Addition:
    """How prices of single sites add up to the whole model."""

    share: float  # of what levels save one site at a time, what all of them save together
    inside: Mapping[str, float]  # mixture -> ms of the dense sites in its experts
    fixed_ms: float  # what no site has
    apart_ms: float = 0.0  # what a call of a site takes more in a graph of its own

    def in_place(self, alone_ms: float) -> float:
        """What a call of a site takes in the whole model that takes so much alone."""
        return max(alone_ms - self.apart_ms, LEAST_RATIO * alone_ms)


def added_up(
    sites: SitePrices,
    calls: Mapping[str, int],
    offered: Mapping[str, Sequence[Level]],
    inner: Mapping[str, Sequence[str]],
    *,
    whole_ms: float,
    together: tuple[Mapping[str, Level], float] | None,
    measured: bool,
    cold: bool = False,
) -> Addition:
    """The addition by which the dense model takes `whole_ms`.

    Each part that is timed `cold` waits anew for its first weights, where the whole reads on: what
    all dense ones take too much is an equal time for each.

    `inner` has the sites in the experts of a mixture. Where sites share maps, `together` has
    a level for each, and what all of them save.
    """
    apart_ms = 0.0
    if cold:
        alone = {n: sites.dense_ms(n) * count for n, count in calls.items()}
        twice = sum(alone[n] for names in inner.values() for n in names)
        apart_ms = max(sum(alone.values()) - twice - whole_ms, 0.0) / sum(calls.values())
    placed = Addition(1.0, {}, 0.0, apart_ms)
    dense = {n: placed.in_place(sites.dense_ms(n)) * count for n, count in calls.items()}
    fastest = {
        n: calls[n]
        * placed.in_place(sites.dense_ms(n) - max(sites.saved_ms(n, lv) for lv in levels))
        for n, levels in offered.items()
    }
    # What is priced as sites of their own is not counted in the mixture again.
    inside = {n: min(fastest[n], sum(dense[m] for m in names)) for n, names in inner.items()}
    share, fixed_ms = 1.0, whole_ms - sum(ms - inside.get(n, 0.0) for n, ms in dense.items())
    if together is not None:
        gains = sum(calls[n] * sites.saved_ms(n, lv) for n, lv in together[0].items())
        share = min(max(together[1] / gains, MIN_SHARE), 1.0) if gains > 0 else 1.0
    elif measured:
        # No whole is faster than one of its parts. Prices of a busy machine can say so; the check
        # on whole models then finds them out. Those of a model are exact: where kernels of several
        # parts run as one, as the first maps of all experts do, parts add up to more.
        least = [dense[n] - inside[n] if n in inside else ms for n, ms in fastest.items()]
        fixed_ms = max(fixed_ms, max(least) - sum(least))
    return Addition(share, inside, fixed_ms, apart_ms)


class Evidence(NamedTuple):
    """What a fit of the surplus reads before any checked model: the same for every one of them."""

    dense: Whole
    likely: Terms  # how large the coefficient of each term may well be, as a standard deviation

    def surplus(self, wholes: Sequence[Whole], *, unexplained: float) -> Terms:
        """What parts take beyond what they take alone, as these and `wholes` tell, of all but the
        dense model so much unexplained."""
        cut = [whole._replace(noise=math.hypot(whole.noise, unexplained)) for whole in wholes]
        return fit([self.dense, *cut], self.likely)


@dataclass(slots=True)
class Prices:
    """Site prices with what is needed to price a whole allocation."""

    table: LatencyTable
    path: Path
    sites: SitePrices
    calls: Mapping[str, int]
    dense_ms: float
    whole_ms: float  # of the dense model in the numeric of the whole network
    add: Addition
    seconds: float
    from_cache: bool
    doubt: Doubt | None  # how far prices that nobody measured may be off
    surplus: Terms = field(default_factory=dict)  # term -> ms, or a share: beyond what parts take
    # alone

    def ms(self, site: str, level: Level) -> float:
        """Time of all calls of a site at a level, as part of the whole model."""
        alone = self._alone_ms(site, level)
        ms = max(alone + beyond_ms(self.surplus, self._terms(site, level)), LEAST_RATIO * alone)
        return ms * self.calls[site] - self.add.inside.get(site, 0.0)

    @property
    def fixed_ms(self) -> float:
        """What no site has."""
        return self.add.fixed_ms + self.surplus.get("fixed", 0.0)

    def sum_ms(self, levels: Mapping[str, Level]) -> float:
        """Sum of the prices of all sites at their levels, and of what no site has."""
        return self.fixed_ms + sum(self.ms(name, level) for name, level in levels.items())

    def _alone_ms(self, site: str, level: Level) -> float:
        saved = self.add.share * self.sites.saved_ms(site, level)
        return self.add.in_place(self.sites.dense_ms(site) - saved)

    def _terms(self, site: str, level: Level) -> dict[str, float]:
        """Of what terms one call takes more than alone, and how much of each."""
        terms = self.sites.near(site, level)
        if not level.removed:
            terms["each"] = 1.0
            terms[f"all {level.within(self.sites.numeric).numeric}"] = self._alone_ms(site, level)
        return terms

    def _likely(self) -> dict[str, float]:
        dense = [self.sites.dense_ms(name) for name in self.calls]
        each = EACH * fmean(dense) + self.add.apart_ms / 2  # or a share of what they take
        found = {"fixed": FIXED * self.whole_ms, "each": each}
        for signature in dict.fromkeys(self.sites.signatures.values()):
            for level in self.table.levels(signature):
                if not level.removed:
                    found[f"all {level.numeric}"] = SCALED
                found[_name_of_kind(signature, level)] = KIND
                knots = self.table.knots(signature, level)
                if level.width in knots:
                    own, alike = _names_of_knot(signature, level, knots)
                    found[own] = OWN * self.table.price(signature, level)
                    found[alike] = KNOT
        return found

    def whole(self, levels: Mapping[str, Level], ratio: float, noise: float = 0.0) -> Whole:
        """The whole model at some levels, all others dense, that takes so much of the dense one."""
        levels = {**self.sites.dense, **levels}
        terms = {"fixed": 1.0}
        for site, level in levels.items():
            for name, often in self._terms(site, level).items():
                terms[name] = terms.get(name, 0.0) + often * self.calls[site]
        alone_ms = replace(self, surplus={}).sum_ms(levels)
        return Whole(alone_ms, ratio * self.whole_ms, noise, terms)

    def evidence(self) -> Evidence:
        """The dense model, and what is likely."""
        return Evidence(self.whole({}, 1.0, SURE), self._likely())

    def corrected(self, by: Correction) -> Prices:
        """The same with a correction that was fitted on whole models."""
        return replace(self, table=self.table.with_correction(by), surplus=by.surplus)

    def gains(self, site: str, level: Level, *, asked: Collection[Difference] = ()) -> bool:
        """Whether a level is faster beyond doubt than without its numeric, and than without its
        pattern, those `asked` for excepted.

        What was measured is left to the search; of a model's prices the interval of the gain must
        exclude 1. Maps that sites share gain once in the whole, but fully in the graph of each.
        """
        if self.doubt is None:
            return True
        ms = self.sites.alone_ms(site, level)
        return all(
            math.log(self.sites.alone_ms(site, level.without(kind)) / ms) > self.doubt.reach([kind])
            for kind in level.differs
            if kind not in asked
        )

    def ratio(self, allocation_ms: float) -> float:
        """Latency relative to dense that a sum of prices means for the whole model."""
        raw = max(allocation_ms / self.whole_ms, LEAST_RATIO)
        whole = self.table.correction.apply(raw) if self.table.correction else raw
        return whole * self.whole_ms / self.dense_ms

    def budget_ms(self, ratio: float) -> float:
        """Sum of prices that comes out at `ratio` of the dense latency."""
        whole = ratio * self.dense_ms / self.whole_ms
        raw = self.table.correction.invert(whole) if self.table.correction else whole
        return raw * self.whole_ms
