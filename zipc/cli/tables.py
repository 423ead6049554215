"""`zipc tables`: the latency tables on this machine, and files of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from zipc.cli.flags import FormatFlag
from zipc.cli.printing import show_fields
from zipc.cli.running import Outcome, run_verb
from zipc.cli.tables_printing import show_difference, show_interpolation, show_list, show_table
from zipc.core.errors import CorruptFile, UsageError
from zipc.core.files import write_atomic
from zipc.core.types import Progress, Workload
from zipc.core.workload import parse_workloads, resized
from zipc.latency_tables.compare import compare, dominated
from zipc.latency_tables.draw import draw
from zipc.latency_tables.interpolate import interpolate
from zipc.latency_tables.store import TableStore, default_cache_dir, place, read_table, workload_key
from zipc.latency_tables.table import LatencyTable

tables_app = typer.Typer(
    help="List, show, compare, join and check latency tables.", no_args_is_help=True
)
COLUMNS = ("signature", "width", "numeric", "pattern", "ms", "ratio", "noise", "samples")

CacheFlag = Annotated[
    Path | None, typer.Option("--cache-dir", help="Where tables and finished stages are kept.")
]
TableArgument = Annotated[
    str,
    typer.Argument(
        help="A table: its file, or its name in `zipc tables list`, of which KEY will do where "
        "there is one, with TARGET/ before it where several targets have it.",
        metavar="TABLE",
        show_default=False,
    ),
]
OutFlag = Annotated[
    Path, typer.Option("-o", "--output", help="File to write; it must not exist yet.")
]


@tables_app.command("list")
def list_verb(*, cache_dir: CacheFlag = None, format: FormatFlag = "table") -> None:
    """Print every table kept on this machine."""

    def body(progress: Progress) -> Outcome:
        store = _store(cache_dir)
        rows = [_summary(path) for path in store.paths()]
        document = {"folder": str(store.root), "tables": rows}
        return Outcome(document, lambda console: show_list(console, document))

    run_verb(body, output=format)


@tables_app.command("show")
def show_verb(
    table: TableArgument,
    *,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png",
            help="Draw it into this file, too; it must not exist yet.",
            metavar="FILE.png",
        ),
    ] = None,
    cache_dir: CacheFlag = None,
    format: FormatFlag = "table",
) -> None:
    """Print the prices of a table: latency against width for every site and precision.

    Where a name stands for a model at several workloads, these are listed.
    """

    def body(progress: Progress) -> Outcome:
        store = _store(cache_dir)
        found = store.matching(table)
        one_model = len({(place(p), p.stem) for p in found}) == 1
        if png is None and one_model and 1 < len(found) == len({workload_key(p) for p in found}):
            rows = {"tables": [_summary(path) for path in found]}
            return Outcome(rows, lambda console: show_list(console, rows))
        path = store.find(table)
        if png is not None:
            _must_be_new(png)
            if png.suffix.lower() != ".png":
                raise UsageError(f"{png} must end in .png.")
        held = read_table(path)
        if png is not None:
            draw(held, png)
        document = _facts(path, held) | {
            "fingerprint": held.fingerprint,
            "state": held.state,
            "notes": list(held.notes),
            "prediction_factor95": math.exp(held.correction.reach) if held.correction else None,
            "prices": _prices(held),
            "in_place": [
                {"signature": e.signature, **_level(e.level), "ratio": e.ratio, "noise": e.noise}
                for e in held.in_place
            ],
        }
        return Outcome(document, lambda console: show_table(console, document))

    run_verb(body, output=format)


@tables_app.command("diff")
def diff_verb(
    first: TableArgument,
    second: TableArgument,
    *,
    cache_dir: CacheFlag = None,
    format: FormatFlag = "table",
) -> None:
    """Print where two tables differ: devices, levels and prices."""

    def body(progress: Progress) -> Outcome:
        store = _store(cache_dir)
        found = compare(*(read_table(store.find(name)) for name in (first, second)))
        document = {
            "setting": list(found.setting),
            "fingerprint": list(found.fingerprint),
            "only_first": found.only_first,
            "only_second": found.only_second,
            "common": len(found.pairs),
            "same_anchor": found.same_anchor,
            "median_difference": found.median_difference,
            "prices": [
                {
                    "signature": p.signature,
                    **_level(p.level),
                    "first_ms": p.first_ms,
                    "second_ms": p.second_ms,
                    "ratio": p.ratio,
                }
                for p in found.pairs
            ],
        }
        return Outcome(document, lambda console: show_difference(console, found))

    run_verb(body, output=format)


@tables_app.command("interpolate")
def interpolate_verb(
    model: Annotated[
        str, typer.Argument(help="A model's name in `zipc tables list`: KEY.", metavar="KEY")
    ],
    size: Annotated[
        str,
        typer.Argument(
            help="A workload between profiled ones: batch x sequence (or past), or a batch.",
            metavar="SIZE",
        ),
    ],
    *,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Whose tables, if those of several: cpu, cpu@board, a100."),
    ] = None,
    cache_dir: CacheFlag = None,
    format: FormatFlag = "table",
) -> None:
    """Print prices at a workload nobody profiled, and how far such prices are off where known.

    The error is that of profiled workloads predicted from their neighbours. Nothing is kept, and
    nothing beyond the profiled workloads is guessed.
    """

    def body(progress: Progress) -> Outcome:
        tables = [read_table(path) for path in _of_one_model(_store(cache_dir), model, target)]
        asked = interpolate(tables, _workload(size, like=tables[0].workload))
        document = {
            "workload": str(asked.workload),
            "between": [str(w) for w in asked.between],
            "median_error": asked.median_error,
            "held_out": [
                {
                    "workload": str(held.workload),
                    "median_error": held.median_error,
                    "worst_error": held.worst_error,
                    "levels": len(held.errors),
                }
                for held in asked.held_out
            ],
            "prices": [
                {
                    "signature": signature,
                    **_level(level),
                    "ms": ms,
                    "error": asked.error((signature, level)),
                }
                for (signature, level), ms in asked.prices.items()
            ],
        }
        return Outcome(document, lambda console: show_interpolation(console, document))

    run_verb(body, output=format)


@tables_app.command("merge")
def merge_verb(
    tables: Annotated[
        list[str],
        typer.Argument(help="Tables of one device and workload; later ones win.", metavar="TABLE"),
    ],
    *,
    output: OutFlag,
    cache_dir: CacheFlag = None,
    format: FormatFlag = "table",
) -> None:
    """Join tables of the same device, runtime, workload and anchor into one file."""

    def body(progress: Progress) -> Outcome:
        store = _store(cache_dir)
        if len(tables) < 2:
            raise UsageError("Give at least two tables to merge.")
        _must_be_new(output)
        held = [read_table(store.find(name)) for name in tables]
        joined = held[0]
        for other in held[1:]:
            joined = joined.merge(other)
        store.save(joined, output)
        document = _facts(output, joined)
        return Outcome(document, lambda console: show_fields(console, document))

    run_verb(body, output=format)


@tables_app.command("export")
def export_verb(
    table: TableArgument,
    *,
    output: OutFlag,
    cache_dir: CacheFlag = None,
    format: FormatFlag = "table",
) -> None:
    """Write a table to a file: all of it as .json, or its prices as .csv."""

    def body(progress: Progress) -> Outcome:
        store = _store(cache_dir)
        held = read_table(store.find(table))
        _must_be_new(output)
        if output.suffix == ".json":
            store.save(held, output)
        elif output.suffix == ".csv":
            write_atomic(output, _csv(_prices(held)))
        else:
            raise UsageError(f"{output} must end in .json or .csv.")
        document = {"path": str(output), "entries": len(held.entries)}
        return Outcome(document, lambda console: show_fields(console, document))

    run_verb(body, output=format)


@tables_app.command("validate")
def validate_verb(
    files: Annotated[
        list[Path], typer.Argument(help="Files of tables.", metavar="FILE", show_default=False)
    ],
    *,
    format: FormatFlag = "table",
) -> None:
    """Check files of tables: schema, digest, samples. Exit 2 when one cannot be read."""

    def body(progress: Progress) -> Outcome:
        rows = [_summary(path) for path in files]
        document = {"tables": rows, "ok": all(row["error"] is None for row in rows)}
        return Outcome(
            document,
            lambda console: show_list(console, {"tables": rows}),
            0 if document["ok"] else CorruptFile.exit_code,
        )

    run_verb(body, output=format)


def _store(cache_dir: Path | None) -> TableStore:
    folder = cache_dir or default_cache_dir()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder, so no tables are kept in it.")
    return TableStore(folder / "tables")


def _of_one_model(store: TableStore, name: str, target: str | None) -> list[Path]:
    """Tables at every workload of one model on one target.

    Raises:
        UsageError: there is none, or there are several models or targets of that name.
    """
    if Path(name).is_file():
        raise UsageError(
            f"{name} is one table, and prices between workloads take those of three or more. Give "
            "the KEY of a model in zipc tables list."
        )
    found = [p for p in store.matching(name) if target in (None, place(p))]
    places = sorted({place(p) for p in found})
    if len(places) == 1 and len({p.stem for p in found}) == 1:
        return found
    raise UsageError(
        f"'{name}' means tables of several models or targets ({', '.join(places)}), and one is "
        "needed. Give more of KEY, or --target; see zipc tables list."
        if places
        else f"'{name}' has no table of target '{target}'. Run: zipc tables list"
    )


def _workload(size: str, *, like: Workload) -> Workload:
    """The workload of a size; what the size does not say is as in `like`."""
    sizes = parse_workloads(size, what="SIZE")
    if len(sizes) > 1:
        raise UsageError(f"'{size}' are {len(sizes)} sizes. Give one, as in 4x128.")
    ((batch, length),) = sizes
    if like.past_length is not None:
        return replace(like, batch_size=batch, past_length=length or like.past_length)
    return resized(like, batch_size=batch, sequence_length=length)


def _must_be_new(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} exists already. Give another name, or remove it.")


def _summary(path: Path) -> dict[str, Any]:
    """What is said of a table in a list; of a damaged one, what is wrong with it."""
    try:
        return _facts(path, read_table(path))
    except CorruptFile as error:
        return {"name": path.stem, "path": str(path), "error": str(error)}


def _facts(path: Path, held: LatencyTable) -> dict[str, Any]:
    return {
        "name": path.stem,
        "path": str(path),
        "error": None,
        "kind": held.kind,
        "target": held.target,
        "runtime": held.runtime,
        "workload": str(held.workload),
        "workload_key": held.workload.key,
        "entries": len(held.entries),
        "noise": held.noise,
        "correction_error": held.correction.median_error if held.correction else None,
        "created": held.created.isoformat(timespec="seconds"),
    }


def _level(level: Any) -> dict[str, Any]:
    return {"width": level.width, "numeric": level.numeric, "pattern": level.pattern}


def _prices(table: LatencyTable) -> list[dict[str, Any]]:
    idle = dominated(table)
    return [
        {
            "signature": e.signature,
            **_level(e.level),
            "ms": table.price(e.signature, e.level),
            "ratio": e.ratio,
            "noise": e.noise,
            "outlier_share": e.outlier_share,
            "samples": len(e.samples_ms),
            "no_faster_than": idle.get(e.key),
        }
        for e in table.entries
    ]


def _csv(prices: Sequence[Mapping[str, Any]]) -> str:
    page = io.StringIO()
    writer = csv.DictWriter(page, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(prices)
    return page.getvalue()
