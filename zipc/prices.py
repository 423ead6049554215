"""What prices mean for a whole model: of each level of each site, and of a sum of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from zipc.core.types import Difference, Level
from zipc.latency_tables.correction import Correction
from zipc.latency_tables.modelled import Doubt
from zipc.latency_tables.table import LatencyTable

BELIEVED = 0.5  # a surplus in place may well be so much of what is taken alone
MIN_SHARE = 0.05
LEAST_RATIO = 0.01  # of a sum to the whole: where parts overlap, what they save can add up to more
SURE = 0.002  # no ratio of two whole models is believed to be known better

Kind = tuple[str, str]  # numeric and pattern


@dataclass(frozen=True, slots=True)
class SitePrices:
    """What one call of each site takes, alone and in the whole model.

    A part that is timed alone finds its weights in the cache, which the whole model has filled with
    others, and hides what runs beside it there. So what levels save is also measured in place, at
    the ends of their widths (`LatencyTable.in_place`); what they save beyond what they save alone
    goes by straight lines in between.
    """

    table: LatencyTable
    signatures: Mapping[str, str]  # site -> signature in the table
    dense: Mapping[str, Level]
    numeric: str  # of the whole network, which a level in fp32 means too
    beyond: Mapping[str, Mapping[Kind | None, Sequence[tuple[int, float]]]] = field(
        default_factory=dict
    )  # signature -> numeric and pattern, None of a removed site -> (width, ms)

    def alone_ms(self, site: str, level: Level) -> float:
        """Time of one call of a site at a level, in a graph of its own."""
        return self.table.price(self.signatures[site], level.within(self.numeric))

    def saved_ms(self, site: str, level: Level) -> float:
        """What one call of a site saves at a level, all others dense."""
        alone = self.alone_ms(site, self.dense[site]) - self.alone_ms(site, level)
        found = self.beyond.get(self.signatures[site], {})
        points = found.get(_kind(level.within(self.numeric)))
        if not points:
            return alone
        widths, ms = zip(*points, strict=True)
        return alone + float(np.interp(level.width, np.array(widths), np.array(ms)))

    def dense_ms(self, site: str) -> float:
        """What a dense site takes in place: no less than any of its levels saves there."""
        lines = self.beyond.get(self.signatures[site], {}).values()
        most = max((ms for points in lines for _, ms in points), default=0.0)
        return self.alone_ms(site, self.dense[site]) + max(most, 0.0)


def with_savings_in_place(
    sites: SitePrices, calls: Mapping[str, int], whole_ms: float
) -> SitePrices:
    """The prices with what the whole model says of them.

    In place a site takes a surplus over what it takes alone. What a level saves there beyond what
    it saves alone is the surplus of the dense site less its own. That of the dense site shows at
    every level of a signature, so that all of them are asked for it, each by how sure it is beside
    how large its own surplus may well be; what is then left of a measurement is its own surplus,
    or noise, by the same measure.
    """
    found = {}
    for signature in dict.fromkeys(e.signature for e in sites.table.in_place):
        seen = _savings(sites, calls, whole_ms, signature)
        if seen:
            found[signature] = _believed(sites, signature, seen)
    return replace(sites, beyond=found)


@dataclass(frozen=True, slots=True)
class _Saving:
    """What one call saves in place at a level, beyond what it saves alone; in ms."""

    level: Level
    beyond: float
    own: float  # variance of the surplus of the level itself, as large as it may well be
    variance: float  # of `beyond`: that of its surplus and of its measurement


def _savings(
    sites: SitePrices, calls: Mapping[str, int], whole_ms: float, signature: str
) -> list[_Saving]:
    found = []
    for entry in sites.table.in_place:
        alike = cut_together(sites.signatures, signature, entry.level)
        if entry.signature != signature or not alike:
            continue
        each = whole_ms / sum(calls[n] for n in alike)
        beyond = (1 - entry.ratio) * each - sites.saved_ms(alike[0], entry.level)
        error = max(entry.noise, SURE) * entry.ratio * each
        own = (BELIEVED * sites.alone_ms(alike[0], entry.level)) ** 2
        found.append(_Saving(entry.level, beyond, own, own + error**2))
    return found


def _believed(
    sites: SitePrices, signature: str, seen: Sequence[_Saving]
) -> dict[Kind | None, Sequence[tuple[int, float]]]:
    """Lines through what is believed of the savings of a signature: numeric -> (width, ms)."""
    site = next(n for n, s in sites.signatures.items() if s == signature)
    dense = sites.dense[site]
    likely = (BELIEVED * sites.alone_ms(site, dense)) ** 2
    surplus = sum(s.beyond / s.variance for s in seen)
    surplus /= 1 / likely + sum(1 / s.variance for s in seen)
    lines: dict[Kind | None, list[tuple[int, float]]] = {
        _kind(dense.within(sites.numeric)): [(dense.width, 0.0)]
    }
    for saving in seen:
        believed = surplus - (surplus - saving.beyond) * saving.own / saving.variance
        lines.setdefault(_kind(saving.level), []).append((saving.level.width, believed))
    return {kind: sorted(points) for kind, points in lines.items()}


@dataclass(frozen=True, slots=True)
class Addition:
    """How prices of single sites add up to the whole model."""

    share: float  # of what levels save one site at a time, what all of them save together
    inside: Mapping[str, float]  # mixture -> ms of the dense sites in its experts
    fixed_ms: float  # what no site has
    apart_ms: float = 0.0  # what a call of a site takes more in a graph of its own

    def in_place(self, alone_ms: float, *, back_ms: float = 0.0) -> float:
        """What a call of a site takes in the whole model that takes so much alone, where it takes
        so much of `apart_ms` there, too."""
        return max(alone_ms - (self.apart_ms - back_ms), LEAST_RATIO * alone_ms)


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
    each_ms: float = 0.0  # of what a call takes apart, what it does take in the whole
    factors: Mapping[str, float] = field(default_factory=dict)  # numeric -> of what calls take

    def ms(self, site: str, level: Level) -> float:
        """Time of all calls of a site at a level, as part of the whole model."""
        factor = self.factors.get(self._numeric(level), 1.0)
        return factor * self._unscaled_ms(site, level) - self.add.inside.get(site, 0.0)

    def _unscaled_ms(self, site: str, level: Level) -> float:
        alone = self.sites.dense_ms(site) - self.add.share * self.sites.saved_ms(site, level)
        back_ms = 0.0 if level.removed else self.each_ms
        return self.add.in_place(alone, back_ms=back_ms) * self.calls[site]

    def sum_ms(self, levels: Mapping[str, Level]) -> float:
        """Sum of the prices of all sites at their levels, and of what no site has."""
        return self.add.fixed_ms + sum(self.ms(name, level) for name, level in levels.items())

    def _numeric(self, level: Level) -> str:
        own = self.sites.numeric
        return own if level.removed else level.within(own).numeric

    def in_others_ms(self, levels: Mapping[str, Level]) -> dict[str, float]:
        """What of that is of each numeric but the whole's, before `factors`."""
        found: dict[str, float] = {}
        for name, level in levels.items():
            numeric = self._numeric(level)
            if numeric != self.sites.numeric:
                found[numeric] = found.get(numeric, 0.0) + self._unscaled_ms(name, level)
        return found

    def corrected(self, by: Correction) -> Prices:
        """The same with a correction that was fitted on whole models."""
        table = self.table.with_correction(by)
        return replace(self, table=table, each_ms=by.each_ms, factors=by.factors)

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
        raw = max(allocation_ms / self.summed_ms, LEAST_RATIO)
        whole = self.table.correction.apply(raw) if self.table.correction else raw
        return whole * self.whole_ms / self.dense_ms

    def budget_ms(self, ratio: float) -> float:
        """Sum of prices that comes out at `ratio` of the dense latency."""
        whole = ratio * self.dense_ms / self.whole_ms
        raw = self.table.correction.invert(whole) if self.table.correction else whole
        return max(raw, 0.0) * self.summed_ms

    @property
    def summed_ms(self) -> float:
        """The sum of prices of the undiminished whole."""
        return self.whole_ms + self.each_ms * sum(self.calls.values())


def cut_together(signatures: Mapping[str, str], signature: str, level: Level) -> list[str]:
    """The sites of a signature that are measured together in place at a level.

    Of removed attention all but the first: without any, what only it reads would be gone too, as a
    whole encoder without its decoder's attention to it.
    """
    alike = [n for n, s in signatures.items() if s == signature]
    return alike[1:] if level.removed and signature.startswith("heads-") else alike


def _kind(level: Level) -> Kind | None:
    return None if level.removed else (level.numeric, level.pattern)
