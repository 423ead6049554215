"""`zipc bench`: repeat the proof of a finished compile, here or on a board."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zipc.cli.flags import BuildsFlag, FormatFlag, HostFlag, HostPythonFlag, one_host
from zipc.cli.printing import show_fields
from zipc.cli.quantities import parse_seconds
from zipc.cli.running import Outcome, run_verb
from zipc.core.errors import UsageError
from zipc.core.types import Progress
from zipc.manifest import Manifest

if TYPE_CHECKING:
    from zipc.profiler.device import Device

FEWEST_PAIRS = 60  # below it the interval says too little


def bench_verb(
    out: Annotated[
        Path,
        typer.Argument(help="Folder written by zipc compile.", metavar="OUT", show_default=False),
    ],
    *,
    max_time: Annotated[
        str | None,
        typer.Option("--max-time", help="Time runs this long, e.g. 30s; loading on top."),
    ] = None,
    host: HostFlag = None,
    host_python: HostPythonFlag = "python3",
    builds: BuildsFlag = 1,
    format: FormatFlag = "table",
) -> None:
    """Measure OUT/model.onnx against OUT/reference.onnx again: exit 0 when the promise holds."""

    def body(progress: Progress) -> Outcome:
        from zipc.bench import bench

        pairs, device = measurement(out, max_time=max_time, host=host, host_python=host_python)
        result = bench(out, pairs=pairs, builds=builds, progress=progress, device=device)
        for note in device.notes:
            progress.info(note)
        document = result.to_json()
        return Outcome(document, lambda console: show_fields(console, document), result.exit_code)

    run_verb(body, output=format)


def measurement(
    out: Path, *, max_time: str | None, host: list[str] | None, host_python: str
) -> tuple[int | None, Device]:
    """How many pairs are to be timed, None for as many as usual, and where."""
    from zipc.devices import device_of

    pairs = None
    if max_time is not None:
        pairs = pairs_within(parse_seconds(max_time, "--max-time"), Manifest.read(out))
    return pairs, device_of(out, host=one_host(host, host_python), python=host_python)


def pairs_within(seconds: float, manifest: Manifest) -> int:
    """How many pairs fit, each graph being run twice per pair (once untimed).

    Raises:
        UsageError: too few for a verdict, or nothing was ever measured.
    """
    latency = manifest.latency
    if latency.reference_ms is None or latency.compiled_ms is None:
        raise UsageError("This compile was never measured: run zipc bench without --max-time.")
    seconds_each = 2 * (latency.reference_ms + latency.compiled_ms) / 1e3
    pairs = int(seconds / seconds_each)
    if pairs < FEWEST_PAIRS:
        enough = _rounded_up(FEWEST_PAIRS * seconds_each)
        raise UsageError(
            f"--max-time {seconds:g}s is enough for {pairs} pairs; a verdict needs "
            f"{FEWEST_PAIRS}. Give at least {enough:g}s."
        )
    return pairs


def _rounded_up(seconds: float) -> float:
    """To two digits, and a little more than asked, so that dividing it gives no pair too few."""
    step = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return float(f"{step * math.ceil(1.001 * seconds / step):.6g}")
