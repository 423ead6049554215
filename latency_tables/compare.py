"""What a table says against another, and against itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from zipc.core.types import Level
from zipc.latency_tables.store import differences
from zipc.latency_tables.table import EntryKey, LatencyTable


@dataclass(frozen=True, slots=True)
class PricePair:
    """One level as two tables have it, in milliseconds."""

    signature: str
    level: Level
    first_ms: float
    second_ms: float
    ratio: float  # second / first; of the ratios to the anchor, where both timed the same one


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two tables side by side; `pairs` are what both have, the largest difference first."""

    setting: tuple[str, ...]  # of kind, target, runtime and workload what differs, in words
    fingerprint: tuple[str, ...]  # fields that differ, in words
    only_first: int
    only_second: int
    same_anchor: bool
    pairs: tuple[PricePair, ...]

    @property
    def median_difference(self) -> float | None:
        """Median over the common entries of how far their ratio is from 1; None without any."""
        return median(abs(p.ratio - 1) for p in self.pairs) if self.pairs else None


def compare(first: LatencyTable, second: LatencyTable) -> Comparison:
    """Compare the prices of all levels that two tables have in common."""
    mine, theirs = ({e.key: e for e in t.entries} for t in (first, second))
    settings = [
        {"kind": t.kind, "target": t.target, "runtime": t.runtime, "workload": str(t.workload)}
        for t in (first, second)
    ]
    same_anchor = bool(first.anchor) and all(
        getattr(first, name) == getattr(second, name) for name in ("anchor", "runtime", "workload")
    )
    pairs = []
    for key in mine.keys() & theirs.keys():
        before, after = first.price(*key), second.price(*key)
        ratio = theirs[key].ratio / mine[key].ratio if same_anchor else after / before
        pairs.append(PricePair(*key, before, after, ratio))
    return Comparison(
        tuple(differences(*settings)),
        tuple(differences(first.fingerprint, second.fingerprint)),
        len(mine.keys() - theirs.keys()),
        len(theirs.keys() - mine.keys()),
        same_anchor,
        tuple(sorted(pairs, key=lambda p: (-abs(p.ratio - 1), p.signature, p.level))),
    )


def dominated(table: LatencyTable) -> Mapping[EntryKey, int]:
    """Levels that save nothing: another width of the site keeps more and is no slower.

    Returns the most units that are kept for no more time, by entry.
    """
    found: dict[EntryKey, int] = {}
    for entry in table.entries:
        level, ms = entry.level, entry.ratio
        wider = [
            other.level.width
            for other in table.entries
            if other.signature == entry.signature
            and (other.level.numeric, other.level.pattern) == (level.numeric, level.pattern)
            and other.level.width > level.width
            and other.ratio <= ms
        ]
        if wider and not level.removed:
            found[entry.key] = max(wider)
    return found
