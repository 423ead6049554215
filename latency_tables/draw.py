"""A table as a picture: latency against width, a panel for each kind of site."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from zipc.core.errors import UsageError
from zipc.core.files import write_atomic
from zipc.latency_tables.compare import dominated
from zipc.latency_tables.table import Entry, LatencyTable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
PANEL = (4.2, 3.2)  # inches
INK = "0.3"
COLOURS = {
    "fp32": "C0",
    "fp16": "C2",
    "int8-dynamic": "C1",
    "int8-static": "C3",
    "int4-weights": "C4",
    "bf16": "C5",
}
Z95 = 1.96  # standard errors to either side of a 95 % interval


def draw(table: LatencyTable, path: Path) -> None:
    """Write `figure_of` a table as PNG.

    Raises:
        UsageError: matplotlib is missing, the file cannot be written, or no site is in the table.
    """
    page = io.BytesIO()
    figure_of(table).savefig(page, format="png")
    write_atomic(path, page.getvalue())


def figure_of(table: LatencyTable) -> Figure:
    """A panel for each kind of site, in it a line for each precision.

    Shaded is the 95 % interval of a price; hollow points save nothing: a wider level is no slower.

    Raises:
        UsageError: matplotlib is missing, or no site is in the table.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("Pictures need matplotlib. Run: pip install 'zipc[plot]'") from error
    panels = _sites(table)
    if not panels:
        raise UsageError(
            f"The table of {table.target}, {table.workload}, has no site at two widths to draw. "
            "Run zipc profile again, or look at its prices without --png."
        )
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = PANEL[0] * columns, PANEL[1] * rows + 0.8
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    figure.suptitle(f"{table.target} under {table.runtime}, {table.workload} ({table.kind})")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    keys: dict[str, Artist] = {}
    for axes, entries in zip(grid, panels, strict=False):
        _panel(axes, table, entries)
        handles, names = axes.get_legend_handles_labels()
        keys |= dict(zip(names, handles, strict=True))
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.legend(
        keys.values(), keys, loc="outside lower center", ncols=2 * columns, fontsize="small"
    )
    return figure


def _sites(table: LatencyTable) -> list[list[Entry]]:
    """Entries by signature, ascending in width; whole models, at one width only, are left out."""
    ordered = sorted(table.entries, key=lambda e: (e.signature, e.level))
    groups = [list(entries) for _, entries in groupby(ordered, key=lambda e: e.signature)]
    return [entries for entries in groups if len({e.level.width for e in entries}) > 1]


def _panel(axes: Axes, table: LatencyTable, entries: Sequence[Entry]) -> None:
    """Draw one kind of site; `entries` ascend in width."""
    lines: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if not entry.level.removed:
            lines.setdefault((entry.level.numeric, entry.level.pattern), []).append(entry)
    for (numeric, pattern), line in lines.items():
        dense = pattern == "dense"
        _line(
            axes,
            [(e.level.width, table.price(*e.key), e.noise) for e in line],
            style="o-" if dense else "^--",
            colour=COLOURS.get(numeric),
            label=numeric if dense else f"{numeric} {pattern}",
        )
    idle = dominated(table)
    hollow = [e for e in entries if e.key in idle]
    removed = [e for e in entries if e.level.removed]
    for some, marker, fill, label in (
        (hollow, "o", "white", "no faster than a wider one"),
        (removed, "D", INK, "removed"),
    ):
        if some:
            axes.plot(
                [e.level.width for e in some],
                [table.price(*e.key) for e in some],
                marker,
                color=INK,
                markerfacecolor=fill,
                markersize=5,
                label=label,
            )
    axes.set_title(entries[0].signature, fontsize=9)
    axes.set_xlabel("units kept")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)


def _line(
    axes: Axes,
    points: Sequence[tuple[int, float, float]],
    *,
    style: str,
    colour: str | None,
    label: str,
) -> None:
    """Draw (width, milliseconds, relative noise) with the interval of the milliseconds."""
    widths, prices = [w for w, _, _ in points], [ms for _, ms, _ in points]
    (drawn,) = axes.plot(
        widths, prices, style, color=colour, markersize=3.5, linewidth=1.3, label=label
    )
    low, high = ([ms * (1 + z * noise) for _, ms, noise in points] for z in (-Z95, Z95))
    axes.fill_between(widths, low, high, color=drawn.get_color(), alpha=0.25, linewidth=0)
