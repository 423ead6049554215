"""What people read of latency tables: lists, prices against width, differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zipc.cli.printing import show_fields, show_unread
from zipc.core.figures import three_digits
from zipc.latency_tables.compare import Comparison
from zipc.latency_tables.store import short_name

FIGURES = ("prices", "noise", "sums off by")
LEAST_NEEDED = ("created", "kind", "noise", "workload", "runtime")  # names have the workload's key
GAP = 2  # between columns
BAR = 24  # characters of the longest bar
WORST = 10  # entries of a comparison that are printed


def show_list(console: Console, document: Mapping[str, Any]) -> None:
    rows = document["tables"]
    if not rows:
        console.print(
            f"no tables under {document['folder']}; zipc profile MODEL makes one",
            markup=False,
            soft_wrap=True,
        )
        return
    cells = [_cells(row) for row in rows if row["error"] is None]
    if cells:
        console.print(_fitting(cells, console.width), soft_wrap=True)
    show_unread(console, rows)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    off = row["correction_error"]
    return {
        "name": short_name(row["name"], row["workload_key"]),
        **{name: row[name] for name in ("kind", "target", "runtime", "workload")},
        "prices": str(row["entries"]),
        "noise": f"{row['noise']:.1%}",
        "sums off by": "-" if off is None else f"{off:.1%}",
        "created": row["created"][:16].replace("T", " "),
    }


def _fitting(rows: Sequence[Mapping[str, str]], width: int) -> Table:
    """A table of as many columns as there is room for, and wider than that before a name breaks."""
    widths = {n: max(map(cell_len, (n, *(row[n] for row in rows)))) for n in rows[0]}
    widths["workload"] = max(cell_len(word) for row in rows for word in row["workload"].split())

    def needed() -> int:
        return sum(widths.values()) + GAP * (len(widths) - 1)

    for name in LEAST_NEEDED:
        if needed() > width:
            del widths[name]
    table = Table(box=None, pad_edge=False, width=needed() if needed() > width else None)
    for name, least in widths.items():
        justify: Literal["left", "right"] = "right" if name in FIGURES else "left"
        table.add_column(name, justify=justify, min_width=least, no_wrap=name != "workload")
    for row in rows:
        table.add_row(*(escape(row[name]) for name in widths))
    return table


def show_table(console: Console, document: Mapping[str, Any]) -> None:
    shown = ("path", "kind", "target", "runtime", "workload", "created", "fingerprint", "notes")
    errors = ("noise", "correction_error", "prediction_factor95")
    show_fields(console, {n: document[n] for n in (*shown, *errors)})
    _show_sites(console, document["prices"], doubt="noise")


def show_interpolation(console: Console, document: Mapping[str, Any]) -> None:
    """Print prices that nobody measured, below how far off such prices are."""
    low, high = document["between"]
    console.print(f"{document['workload']}: between {low} and {high}", markup=False, soft_wrap=True)
    for held in document["held_out"]:
        console.print(
            f"{held['workload']}, predicted from its neighbours: {held['levels']} prices off by "
            f"{held['median_error']:.1%} (median), {held['worst_error']:.1%} (worst)",
            markup=False,
            soft_wrap=True,
        )
    _show_sites(console, document["prices"], doubt="error")


def _show_sites(console: Console, prices: Sequence[Mapping[str, Any]], *, doubt: str) -> None:
    for signature in dict.fromkeys(p["signature"] for p in prices):
        ours = [p for p in prices if p["signature"] == signature]
        _show_site(console, signature, ours, doubt=doubt)


def _show_site(
    console: Console, signature: str, prices: Sequence[Mapping[str, Any]], *, doubt: str
) -> None:
    """Milliseconds against width, a bar for each precision, the widest first.

    `doubt` is the column that says how far a price may be off.
    """
    longest = max(p["ms"] for p in prices)
    table = Table(box=None, pad_edge=False, title=escape(signature), title_justify="left")
    table.add_column("width", justify="right")
    table.add_column("numeric")
    table.add_column("ms", justify="right")
    table.add_column(doubt, justify="right")
    table.add_column("", no_wrap=True)
    for p in sorted(prices, key=lambda p: (p["numeric"], -p["width"])):
        bar = "█" * max(1, round(BAR * p["ms"] / longest))
        numeric = p["numeric"] if p["pattern"] == "dense" else f"{p['numeric']} {p['pattern']}"
        table.add_row(
            str(p["width"]) if p["width"] else "removed",
            escape(numeric) if p["width"] else "",
            three_digits(p["ms"]),
            "-" if p[doubt] is None else f"{p[doubt]:.1%}",
            " ".join([bar, *_remarks(p)]),
        )
    console.print()
    console.print(table)


def _remarks(price: Mapping[str, Any]) -> Iterable[str]:
    if price.get("no_faster_than") is not None:
        yield f"no faster than {price['no_faster_than']}"
    if price.get("outlier_share"):
        yield f"{price['outlier_share']:.0%} outliers"


def show_difference(console: Console, found: Comparison) -> None:
    for line in _difference(found):
        console.print(line, markup=False, soft_wrap=True)


def _difference(found: Comparison) -> Iterable[str]:
    yield from found.setting
    yield from (f"device: {line}" for line in found.fingerprint)
    yield (
        f"{len(found.pairs)} levels in both, {found.only_first} only in the first, "
        f"{found.only_second} only in the second"
    )
    if found.median_difference is None:
        return
    if not found.same_anchor:
        yield (
            "the tables are of different models, runtimes or workloads: what has one name in both "
            "may not be the same graph"
        )
    what = "ratios to the same anchor" if found.same_anchor else "milliseconds"
    yield f"prices ({what}) differ by {found.median_difference:.1%} (median)"
    for p in found.pairs[:WORST]:
        yield (
            f"  {p.signature} at {p.level}: {three_digits(p.first_ms)} ms, "
            f"{three_digits(p.second_ms)} ms ({p.ratio - 1:+.1%})"
        )
