"""Prices at a workload between profiled ones, and how far such prices are off where that is known.

Along one axis (batch, sequence or past length), all else equal, a price is taken from the straight
line between its neighbours: work grows linearly with the batch, and nearly so with a length. How
nearly is measured: every profiled workload that lies between two others is predicted from these.
Where there is none the error is unknown, and beyond the outermost there are no neighbours: both
are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from zipc.core.errors import UsageError
from zipc.core.types import Workload
from zipc.core.workload import resized
from zipc.latency_tables.table import EntryKey, LatencyTable, profile_command

AXES: Mapping[str, Callable[[Workload, Workload], Workload]] = {  # a workload moved to another's
    "batch_size": lambda w, to: resized(w, batch_size=to.batch_size),
    "sequence_length": lambda w, to: replace(w, sequence_length=to.sequence_length),
    "past_length": lambda w, to: replace(w, past_length=to.past_length),
}


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A profiled workload, predicted from its neighbours: relative errors over all levels."""

    workload: Workload
    errors: Mapping[EntryKey, float]

    @property
    def median_error(self) -> float:
        return median(self.errors.values())

    @property
    def worst_error(self) -> float:
        return max(self.errors.values())


@dataclass(frozen=True, slots=True)
class Interpolation:
    """Milliseconds by level at a workload between two profiled ones; never measured."""

    workload: Workload
    between: tuple[Workload, Workload]
    prices: Mapping[EntryKey, float]
    held_out: tuple[HeldOut, ...]

    @property
    def median_error(self) -> float:
        """Over the levels of all workloads left out."""
        return median(e for held in self.held_out for e in held.errors.values())

    def error(self, key: EntryKey) -> float | None:
        """The largest error this level had where it was left out; None where it never was."""
        found = [held.errors[key] for held in self.held_out if key in held.errors]
        return max(found, default=None)


def interpolate(tables: Sequence[LatencyTable], workload: Workload) -> Interpolation:
    """Price a workload between those of tables of one model on one device.

    Where it lies on two axes, the one with the smaller error on what was left out is taken.

    Raises:
        UsageError: the tables are not of one device, the workload is profiled or not between
            others, or nothing says how large the error is.
    """
    first = tables[0]
    fields = ("kind", "target", "runtime", "fingerprint")
    if any(getattr(t, name) != getattr(first, name) for t in tables for name in fields):
        raise UsageError(
            "Only prices of one device are interpolated, and these tables are of several."
        )
    measure = profile_command(first.target, workload)
    if any(t.workload == workload for t in tables):
        raise UsageError(
            f"{workload} was profiled itself: run zipc tables show KEY@{workload.key}."
        )
    lines = {
        axis: [t for t in tables if move(t.workload, workload) == workload]
        for axis, move in AXES.items()
    }
    found = [_along(axis, line, workload) for axis, line in lines.items()]
    between = [f for f in found if f is not None]
    if not between:
        profiled = "; ".join(str(t.workload) for t in tables)
        raise UsageError(
            f"{workload} is not between the least and the largest of three or more workloads that "
            f"were profiled along one axis ({profiled}): the error could not be told. {measure}"
        )
    return min(between, key=lambda f: f.median_error)


def _along(axis: str, line: Sequence[LatencyTable], workload: Workload) -> Interpolation | None:
    """Interpolate between tables that differ in `axis` only; None where that is not possible."""

    def at(w: Workload) -> int:
        size: int = getattr(w, axis)
        return size

    line = sorted(line, key=lambda t: at(t.workload))
    bounds = [p for p in pairwise(line) if at(p[0].workload) < at(workload) < at(p[1].workload)]
    held = []
    for low, middle, high in zip(line, line[1:], line[2:], strict=False):
        guesses = _straight(low, high, at, middle.workload).items()
        errors = {k: abs(ms / middle.price(*k) - 1) for k, ms in guesses if middle.has(*k)}
        if errors:
            held.append(HeldOut(middle.workload, errors))
    if not bounds or not held:
        return None
    ((low, high),) = bounds
    prices = _straight(low, high, at, workload)
    return Interpolation(workload, (low.workload, high.workload), prices, tuple(held))


def _straight(
    low: LatencyTable, high: LatencyTable, at: Callable[[Workload], int], workload: Workload
) -> dict[EntryKey, float]:
    """Prices of the levels that both have, on the line between them."""
    share = (at(workload) - at(low.workload)) / (at(high.workload) - at(low.workload))
    return {
        e.key: (1 - share) * low.price(*e.key) + share * high.price(*e.key)
        for e in low.entries
        if high.has(*e.key)
    }
