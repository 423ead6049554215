"""The latency table: what every level of every site costs on one device, with the raw samples.

An entry is stored as paired samples of a small graph and of the anchor graph timed beside it. Its
price is the ratio of the two times the median anchor of the whole table, so that a machine which
slowed down half-way through a sweep does not tilt the prices of the sites measured last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from math import sqrt
from statistics import median
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from zipc.core.errors import TableMissing, UsageError
from zipc.core.text import CONTROL
from zipc.core.types import LONGEST_MS, NUMERICS, Level, TableKind, Workload
from zipc.core.workload import WorkloadField
from zipc.latency_tables.correction import Correction

SCHEMA_VERSION: Literal[5] = 5  # since 2: whole models; since 5: other corrections
MAD_TO_SIGMA = 1.4826  # of a normal distribution
OUTLIER_SIGMAS = 5.0

MOST_UNITS = 10**9  # of a site


def _plausible(ms: float) -> float:
    if ms > LONGEST_MS:
        raise ValueError(f"{ms:g} ms is no time that anybody measured")
    return max(round(ms, 5), 1e-5)


def _printable(name: str) -> str:
    if CONTROL.search(name):
        raise ValueError("there are control characters in it")
    return name


Milliseconds = Annotated[
    float, Field(gt=0, allow_inf_nan=False, strict=True), AfterValidator(_plausible)
]
Name = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
EntryKey = tuple[str, Level]


class Entry(BaseModel):
    """One price: a site signature at one level, as paired samples with the anchor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signature: Name
    level: Level
    samples_ms: tuple[Milliseconds, ...] = Field(min_length=1)
    anchor_ms: tuple[Milliseconds, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_measurement(self) -> Self:
        if len(self.samples_ms) != len(self.anchor_ms):
            raise ValueError("samples_ms and anchor_ms must be of equal length")
        if not 0 <= self.level.width <= MOST_UNITS:
            raise ValueError(f"a width is 0 to {MOST_UNITS}, not {self.level.width}")
        if self.level.numeric not in NUMERICS:
            raise ValueError(f"there is no numeric '{self.level.numeric}'")
        return self

    @property
    def key(self) -> EntryKey:
        return entry_key(self.signature, self.level)

    @cached_property
    def ratio(self) -> float:
        """Median of sample / anchor, pairwise."""
        return median(self._ratios)

    @property
    def noise(self) -> float:
        """Relative uncertainty of `ratio`: robust standard error plus what outliers can shift it.

        Outliers stay among the samples; a share e of them, all on one side, moves the median of
        the rest by about e standard deviations.
        """
        return self._spread / self.ratio * (1 / sqrt(len(self._ratios)) + self.outlier_share)

    @property
    def outlier_share(self) -> float:
        """Share of samples further than five robust standard deviations from the median."""
        limit = OUTLIER_SIGMAS * self._spread
        return sum(abs(r - self.ratio) > limit for r in self._ratios) / len(self._ratios)

    def pooled(self, other: Entry) -> Entry:
        """Join the samples of two measurements of the same level."""
        if self.key != other.key:
            raise ValueError(f"cannot pool {self.key} with {other.key}")
        return Entry(
            signature=self.signature,
            level=self.level,
            samples_ms=self.samples_ms + other.samples_ms,
            anchor_ms=self.anchor_ms + other.anchor_ms,
        )

    @cached_property
    def _ratios(self) -> tuple[float, ...]:
        return tuple(s / a for s, a in zip(self.samples_ms, self.anchor_ms, strict=True))

    @cached_property
    def _spread(self) -> float:
        return MAD_TO_SIGMA * median(abs(r - self.ratio) for r in self._ratios)


class LatencyTable(BaseModel):
    """(site signature, level) → measurement, for one target, runtime and workload.

    Immutable: `with_entries`, `with_note` and `merge` return new tables. `anchor` names the anchor
    graph (its hash): ratios to different anchors are not comparable. An entry of `in_place` is a
    whole model, in floats or with every site at its fastest level, beside the undiminished whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[5] = SCHEMA_VERSION
    kind: TableKind = "measured"
    target: Name
    runtime: Name
    workload: WorkloadField
    fingerprint: dict[str, Any]
    state: dict[str, Any] = Field(default_factory=dict)
    anchor: str = ""
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    entries: tuple[Entry, ...] = ()
    in_place: tuple[Entry, ...] = ()
    correction: Correction | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _keys_are_unique(self) -> Self:
        for entries in (self.entries, self.in_place):
            seen: set[EntryKey] = set()
            for entry in entries:
                if entry.key in seen:
                    raise ValueError(f"two entries for {entry.signature} at {entry.level}")
                seen.add(entry.key)
        return self

    @cached_property
    def anchor_ms_p50(self) -> float:
        """Median of all anchor samples of the table, in milliseconds.

        Raises:
            TableMissing: the table has no entries.
        """
        samples = [ms for entry in self.entries for ms in entry.anchor_ms]
        if not samples:
            raise TableMissing(f"The latency table of {self._where} is empty. {self._next_command}")
        return median(samples)

    @property
    def noise(self) -> float:
        """Median relative noise of the entries; 0 for an empty table."""
        return median(entry.noise for entry in self.entries) if self.entries else 0.0

    def price(self, signature: str, level: Level) -> float:
        """Milliseconds of one site at one level.

        Raises:
            TableMissing: it was never measured.
        """
        return self.entry(signature, level).ratio * self.anchor_ms_p50

    def entry(self, signature: str, level: Level) -> Entry:
        """Return the measurement behind a price.

        Raises:
            TableMissing: it was never measured.
        """
        try:
            return self._index[entry_key(signature, level)]
        except KeyError:
            raise TableMissing(
                f"The latency table of {self._where} has no price for {signature} at {level}. "
                f"{self._next_command}"
            ) from None

    def has(self, signature: str, level: Level) -> bool:
        return entry_key(signature, level) in self._index

    def levels(self, signature: str) -> tuple[Level, ...]:
        """All priced levels of a signature, ascending."""
        return self._levels.get(signature, ())

    def knots(self, signature: str, level: Level) -> tuple[int, ...]:
        """Of the priced widths of a signature, in the numeric and pattern of a level: the least,
        the middle one, the greatest and the one below that, since what is cut at all may run
        otherwise than the whole. A removed site has none but its own.
        """
        return self._knots[_line(signature, level)]

    def with_entries(self, entries: Iterable[Entry], *, in_place: bool = False) -> LatencyTable:
        """Add entries, or whole models; one with the key of an old one replaces it."""
        name = "in_place" if in_place else "entries"
        held: tuple[Entry, ...] = getattr(self, name)
        index = {entry.key: entry for entry in (*held, *entries)}
        return self._replaced(**{name: tuple(index[key] for key in sorted(index))})

    def with_note(self, note: str) -> LatencyTable:
        return self if note in self.notes else self._replaced(notes=(*self.notes, note))

    def unplaced(self) -> LatencyTable:
        """The same without what was measured on whole models."""
        return self._replaced(in_place=(), correction=None)

    def with_correction(self, correction: Correction | None) -> LatencyTable:
        return self._replaced(correction=correction)

    def merge(self, other: LatencyTable) -> LatencyTable:
        """Join two tables of the same device and workload; entries of `other` win.

        The correction is dropped where the joined entries differ from those it was fitted on.

        Raises:
            UsageError: they are not of the same device, runtime, workload, kind or anchor graph.
        """
        fields = ("kind", "target", "runtime", "workload", "anchor", "fingerprint")
        different = [name for name in fields if getattr(self, name) != getattr(other, name)]
        if different:
            raise UsageError(
                f"Cannot merge latency tables of {self._where} and {other._where}: they differ in "
                f"{', '.join(different)}. Tables are merged that are of one model on one device "
                "in one state; what differs, zipc tables diff tells."
            )
        merged = self.with_entries(other.entries).with_entries(other.in_place, in_place=True)
        for note in other.notes:
            merged = merged.with_note(note)
        return merged.with_correction(
            next(
                (
                    t.correction
                    for t in (other, self)
                    if (t.entries, t.in_place) == (merged.entries, merged.in_place)
                ),
                None,
            )
        )

    @cached_property
    def _index(self) -> dict[EntryKey, Entry]:
        return {entry.key: entry for entry in self.entries}

    @cached_property
    def _levels(self) -> dict[str, tuple[Level, ...]]:
        levels: dict[str, list[Level]] = {}
        for entry in self.entries:
            levels.setdefault(entry.signature, []).append(entry.level)
        return {signature: tuple(sorted(found)) for signature, found in levels.items()}

    @cached_property
    def _knots(self) -> dict[tuple[str, str, str, bool], tuple[int, ...]]:
        lines: dict[tuple[str, str, str, bool], list[int]] = {}
        for entry in self.entries:
            lines.setdefault(_line(entry.signature, entry.level), []).append(entry.level.width)
        return {line: _spread(sorted(widths)) for line, widths in lines.items()}

    @property
    def _where(self) -> str:
        return f"target '{self.target}' ({self.runtime}, {self.workload.key})"

    @property
    def _next_command(self) -> str:
        return profile_command(self.target, self.workload)

    def _replaced(self, **changes: Any) -> LatencyTable:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return LatencyTable(**(fields | changes))


def entry_key(signature: str, level: Level) -> EntryKey:
    """Key of a price. A removed site costs the same whatever its numeric would have been."""
    return signature, Level(0) if level.removed else level


def _line(signature: str, level: Level) -> tuple[str, str, str, bool]:
    signature, level = entry_key(signature, level)
    return signature, level.numeric, level.pattern, level.removed


def _spread(widths: Sequence[int]) -> tuple[int, ...]:
    least, most = widths[0], widths[-1]
    middle = min(widths, key=lambda width: abs(2 * width - least - most))
    return tuple(sorted({least, middle, *widths[-2:]}))


def profile_command(target: str, workload: Workload) -> str:
    """Name the command that would fill this table."""
    return f"Run: zipc profile MODEL --target {target} {workload.flags}"
