"""What people read on the terminal: a finished compile, a plan, and plain fields."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zipc.core.figures import three_digits
from zipc.core.request import Request
from zipc.core.types import LeftAlone, Level
from zipc.manifest import TENSORRT, Manifest
from zipc.user_code import split_reference

if TYPE_CHECKING:
    from zipc.pipeline import Plan

_COLOURS = {"validated": "green", "predicted": "yellow", "missed": "red", "inconclusive": "yellow"}
CLOSE = 0.05  # of what was asked
_FEW_SITES = 32  # more than this and the table is shortened to one line per level


def show_manifest(
    console: Console,
    manifest: Manifest,
    *,
    out: Path,
    every_site: bool = False,
    python: str | None = None,
) -> None:
    """Print the proof, quality, sizes and allocation of a compile, and what to run next.

    `python` is that of the board it was measured on, where it is not the one of the compile.
    """
    colour = _COLOURS[manifest.verdict]
    _say(console, f"[bold {colour}]{manifest.verdict}[/]  {_asked(manifest)}")
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(manifest):
        facts.add_row(f"[dim]{name}[/]", escape(value))
    console.print(facts)
    whole = manifest.latency.compiled_ms or manifest.latency.predicted_ms or 0.0
    # what sites take alone is no share of the network where it adds up to more than that takes
    shares = sum(a.predicted_ms or 0.0 for a in manifest.allocation) <= whole
    rows: list[Row] = [
        (a.site, a.level, a.units, a.predicted_ms if shares else None, a.error)
        for a in manifest.allocation
    ]
    _show_allocation(console, rows, every_site=every_site)
    _show_left_alone(console, manifest.left_alone)
    for note in _notes(manifest):
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for path, kind in _places(manifest):
        console.print(f"{out / path}: {kind}", markup=False, soft_wrap=True)
    for command in _next_commands(manifest, out, python):
        console.print(f"next: {command}", markup=False, soft_wrap=True)


def show_plan(console: Console, plan: Plan, *, request: Request) -> None:
    """Print an allocation that was found but not built."""
    _say(
        console,
        f"[bold]predicted {plan.predicted_speedup:.2f}x[/]  "
        f"{_ms(plan.allocation.predicted_ms)} of {_ms(plan.dense_ms)} dense",
    )
    _say(console, escape(plan.data))
    units = {site.name: site.units for site in plan.sites}
    levels = plan.allocation.levels.items()
    rows: list[Row] = [(name, level, units.get(name), None, None) for name, level in levels]
    _show_allocation(console, rows, every_site=True)
    _say(console, f"[dim]predicted error {plan.allocation.predicted_error:.4g}[/]")
    _show_left_alone(console, plan.left_alone)
    console.print(f"next: {_compile_command(request)} -o OUT", markup=False, soft_wrap=True)


def show_structure(console: Console, document: Mapping[str, Any]) -> None:
    """Print what `inspect_model` found: a row per site, then what was left alone and why."""
    sites = document["sites"]
    _say(
        console,
        f"[bold]{escape(document['model'])}[/]  {document['architecture']}, "
        f"{document['parameters'] / 1e6:.2f} M parameters, {len(sites)} sites"
        + (f", {_ms(ms)} ({document['workload']})" if (ms := document["latency_ms"]) else ""),
    )
    table = Table(box=None, pad_edge=False)
    for name in ("site", "kind", "consumers"):
        table.add_column(name, overflow="fold")
    for name in ("units", "widths", "calls", "M parameters", "of all", "of the time"):
        table.add_column(name, justify="right")
    for site in sites:
        consumers = escape("\n".join(site["consumers"]))
        counts = (
            *(str(n) for n in (site["units"], len(site["widths"]), site["calls"])),
            f"{site['parameters'] / 1e6:.3f}",
            f"{site['parameter_share']:.1%}",
            "-" if site["latency_share"] is None else f"{site['latency_share']:.1%}",
        )
        table.add_row(_site(site["name"]), site["kind"], consumers, *counts)
    if sites:
        console.print(table)
    _show_left_alone(console, [LeftAlone(**part) for part in document["left_alone"]])
    for note in document["notes"]:
        _say(console, escape(f"note: {note}"))


def _show_left_alone(console: Console, parts: Iterable[LeftAlone]) -> None:
    """A line for each reason, with all that have it."""
    paths: dict[str, list[str]] = {}
    for part in parts:
        paths.setdefault(part.reason, []).append(part.path)
    for reason, named in paths.items():
        _say(console, escape(f"left alone: {', '.join(named)}: {reason}"))


def show_fields(console: Console, document: Mapping[str, Any]) -> None:
    """Print a flat or nested document as name and value; long lists as their length."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _flat(document):
        table.add_row(f"[dim]{escape(name)}[/]", escape(value))
    console.print(table)


def show_unread(console: Console, rows: Iterable[Mapping[str, Any]]) -> None:
    """Print the `error` of every row of a list that has one."""
    for row in rows:
        if row["error"] is not None:
            console.print(f"not read: {row['error']}", markup=False, soft_wrap=True)


Row = tuple[str, Level, int | None, float | None, float | None]  # site, level, units, ms, error


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True)


def _asked(manifest: Manifest) -> str:
    latency, request, places = manifest.latency, manifest.request, _places_of(manifest)
    if latency.speedup is None:
        got = "not measured"
    else:
        got = f"{latency.speedup:.{places}f}x"
        if latency.speedup_ci95 is not None:
            low, high = latency.speedup_ci95
            how = (
                f"{latency.pairs} pairs" if latency.pairs else f"{latency.table_kind}, not measured"
            )
            got += f" (95 % interval {low:.{places}f} to {high:.{places}f}, {how})"
    if request.speedup is not None:
        return f"{got}, asked {request.speedup:g}x"
    if request.max_drop is not None:
        return f"{got}, the fastest found that loses at most {request.max_drop:g} on dev"
    return f"{got}, asked {request.latency_ms:g} ms" if request.latency_ms is not None else got


def _places_of(manifest: Manifest) -> int:
    """Decimals of a speedup: more where what was got would read like what was asked."""
    latency, asked = manifest.latency, manifest.request.speedup
    if manifest.request.latency_ms is not None and latency.reference_ms is not None:
        asked = latency.reference_ms / manifest.request.latency_ms
    if asked is None or latency.speedup is None:
        return 2
    short = manifest.verdict in ("missed", "inconclusive")
    return 3 if short and abs(latency.speedup / asked - 1) < CLOSE else 2


def _facts(manifest: Manifest) -> Iterable[tuple[str, str]]:
    latency, size = manifest.latency, manifest.size
    yield "model", f"{manifest.model.source}  sha256 {manifest.model.sha256[:12]}"
    host = latency.fingerprint.get("host")
    place = "" if host is None else f" on {host}"
    place += f" ({gpu})" if (gpu := latency.fingerprint.get("gpu")) else ""
    yield "target", f"{manifest.target}{place} under {manifest.runtime}: {manifest.workload}"
    times = "not measured: the device is not here"
    if latency.reference_ms is not None:
        times = f"reference {_ms(latency.reference_ms)}, compiled {_ms(latency.compiled_ms)}"
    free = latency.by_default
    if latency.p90_ms is not None and latency.p99_ms is not None:
        times += f" (p90 {three_digits(latency.p90_ms)}, p99 {three_digits(latency.p99_ms)})"
    yield "latency", times
    if free is not None:
        low, high = free.speedup_ci95
        places = _places_of(manifest)
        but = ", but in fp32" if manifest.runtime == "openvino" else ""
        yield (
            "by default",
            f"{free.speedup:.{places}f}x ({low:.{places}f} to {high:.{places}f}) under the "
            f"runtime's default options{but}, {free.processors} processors",
        )
    predicted = f"from a {latency.table_kind} table"
    if latency.prediction_error is not None and latency.speedup is not None:
        speedup = latency.speedup / (1 + latency.prediction_error)
        predicted = f"{speedup:.2f}x {predicted}"
    else:
        predicted = f"{_ms(latency.predicted_ms)} {predicted}"
    yield "predicted", predicted
    if latency.speedup_vs_best_dense is not None:
        yield "best dense", f"{latency.speedup_vs_best_dense:.2f}x against the fastest dense graph"
    if manifest.quality is not None:
        yield "quality", _quality(manifest)
    yield "size", _sizes(size.dense_mb, size.compiled_mb, size.dense_params, size.compiled_params)
    if manifest.data is not None:
        yield "data", manifest.data.description or manifest.data.source
    if manifest.timings_s:
        yield "took", f"{sum(manifest.timings_s.values()):.0f} s"


def _quality(manifest: Manifest) -> str:
    from zipc.metrics import lower_is_better  # brings scipy, which no other verb waits for

    quality = manifest.quality
    assert quality is not None
    text = f"{quality.metric} on {quality.split}"
    text += f" ({quality.rows:,} rows)" if quality.rows is not None else ""
    places = 4 if quality.metric == "loss" else 2  # the others are x100, or larger
    text += f": dense {quality.dense:.{places}f}"
    if quality.compiled is not None:
        change = quality.compiled - quality.dense
        text += f", compiled {quality.compiled:.{places}f} ({change:+.{places}f}"
        if quality.interval is not None:
            low, high = quality.interval
            text += f", 95 % {low:+.{places}f} to {high:+.{places}f}"
        text += ")"
    if quality.recovered is not None and quality.one_shot is not None:
        text += f", one-shot {quality.one_shot:.{places}f}"
    return text + (", lower is better" if lower_is_better(quality.metric) else "")


def _sizes(dense_mb: float, mb: float, dense_params: int | None, params: int | None) -> str:
    text = f"{dense_mb:.1f} MB to {mb:.1f} MB"
    if dense_params is not None and params is not None:
        text += f", {dense_params / 1e6:.2f} M to {params / 1e6:.2f} M parameters"
    return text


def _show_allocation(console: Console, rows: Sequence[Row], *, every_site: bool) -> None:
    if len(rows) > _FEW_SITES and not every_site:
        counts = Counter(str(level) for _, level, _, _, _ in rows)
        _say(console, ", ".join(f"{n} sites {level}" for level, n in counts.most_common(12)))
        return
    cells = [_cells(row) for row in rows]
    filled = [i for i in range(len(_COLUMNS)) if any(row[i] for row in cells)]
    table = Table(box=None, pad_edge=False)
    for name, justify in (_COLUMNS[i] for i in filled):
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name != "site")
    for row in cells:
        table.add_row(*(row[i] for i in filled))
    console.print(table)


def _site(name: str) -> str:
    """A site's name, a line for each of the modules that have its units in common."""
    return escape(name.replace("+", "+\n"))


def _cells(row: Row) -> tuple[str, ...]:
    site, level, units, ms, error = row
    kept = "removed" if level.removed else "whole" if units == 1 else str(level.width)
    numeric = "" if level.removed else level.numeric
    return (
        _site(site),
        kept if units in (None, 1) or level.removed else f"{kept}/{units}",
        numeric if level.pattern == "dense" else f"{numeric} {level.pattern}",
        "" if ms is None else three_digits(ms),
        "" if error is None else f"{error:.4f}",
    )


def _notes(manifest: Manifest) -> Iterable[str]:
    yield from manifest.latency.notes
    if manifest.quality is not None:
        yield from manifest.quality.notes


def _places(manifest: Manifest) -> Iterable[tuple[str, str]]:
    """Files and what they are; those of a folder as one line."""
    folders = Counter(file.path.split("/")[0] for file in manifest.files if "/" in file.path)
    yield from ((f.path, f.kind) for f in manifest.files if "/" not in f.path)
    yield from ((f"{name}/", f"{count} files") for name, count in folders.items())


def _next_commands(manifest: Manifest, out: Path, python: str | None) -> Iterable[str]:
    if manifest.verdict == "missed":
        floats = all(a.level.numeric == "fp32" for a in manifest.allocation)
        more = floats and manifest.request.numerics != "auto"
        told = ", or allow more with --numerics auto" if more else ""
        yield f"zipc inspect {out}  (ask for less{told})"
    host, asked = manifest.latency.fingerprint.get("host"), manifest.request.model_extra or {}
    board = "" if host is None else f" --host {host}"
    if python is None and asked.get("host") == host:
        python = asked.get("host_python")
    if board and python not in (None, "python3"):
        board += f" --host-python {python}"
    if manifest.runtime == TENSORRT:
        verb = "bench" if board else "validate"
        yield f"zipc {verb} {out}{board or ' --host USER@BOARD'}"
        yield f"sh {out}/build.sh  (on the device: builds the engine and times it)"
    else:
        if any(file.path == "reference.onnx" for file in manifest.files):
            yield f"zipc bench {out}{board}"
        yield f"zipc check NEW --baseline {out}"
    own = manifest.model.source
    factory = f", factory='{own}'" if split_reference(own) is not None else ""
    yield f"""python -c "import zipc; model = zipc.load('{out}'{factory})" """.rstrip()


def _compile_command(request: Request) -> str:
    """The command line of a request: the goal, and every flag that is not at its default."""
    words = ["zipc", "compile", request.model, "--target", request.target]
    if request.speedup is not None:
        words += ["--speedup", f"{request.speedup:g}x"]
    if request.latency_ms is not None:
        words += ["--latency", f"{request.latency_ms:g}ms"]
    words += [] if request.prune else ["--no-prune"]
    words += ["--allow-table-mismatch"] if request.allow_table_mismatch else []
    usual = {field.name: field.default for field in dataclasses.fields(Request)}
    for name, flag in _FLAGS.items():
        value = getattr(request, name)
        if value != usual[name]:
            many = value if isinstance(value, tuple) else (value,)
            words += [word for one in many for word in (flag, str(one))]
    return shlex.join(words)


def _ms(value: float | None) -> str:
    return "not measured" if value is None else f"{three_digits(value)} ms"


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in document.items():
        where = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}.")
        elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
            for index, item in enumerate(value):
                yield from _flat(item, f"{where}.{index}.")
        elif isinstance(value, list | tuple):
            shown = ", ".join(_value(v) for v in value)
            yield where, shown if len(value) <= 8 else f"{len(value)} values"
        elif value is not None:
            yield where, _value(value)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_FLAGS: Mapping[str, str] = {  # those whose value is their text
    "runtime": "--runtime",
    "weights": "--weights",
    "host": "--host",
    "host_python": "--host-python",
    "data": "--data",
    "numerics": "--numerics",
    "pattern": "--pattern",
    "metric": "--metric",
    "evaluator": "--eval",
    "text_columns": "--text-column",
    "label_column": "--label-column",
    "include": "--include",
    "exclude": "--exclude",
    "effort": "--effort",
    "seed": "--seed",
    "threads": "--threads",
    "batch_size": "--batch-size",
    "sequence_length": "--sequence-length",
    "phase": "--phase",
    "past_length": "--past-length",
    "input_shapes": "--input-shapes",
    "quantizer": "--quantizer",
    "cache_dir": "--cache-dir",
}
_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("site", "left"),
    ("kept", "right"),
    ("numeric", "left"),
    ("ms, priced alone", "right"),
    ("error of the cut", "right"),
)
