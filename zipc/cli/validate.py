"""`zipc validate`: repeat the proof of a finished compile and write what came out into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipc.cli.bench import pairs_within
from zipc.cli.flags import FormatFlag, HostFlag, HostPythonFlag, parse_seconds
from zipc.cli.printing import show_manifest
from zipc.cli.running import Outcome, run_verb
from zipc.core.types import Progress
from zipc.manifest import Manifest

EXIT_CODES = {"validated": 0, "missed": 1}  # of the rest: 3


def validate_verb(
    out: Annotated[
        Path,
        typer.Argument(help="Folder written by zipc compile.", metavar="OUT", show_default=False),
    ],
    *,
    max_time: Annotated[
        str | None, typer.Option("--max-time", help="Measure about this long, e.g. 30s.")
    ] = None,
    host: HostFlag = None,
    host_python: HostPythonFlag = "python3",
    format: FormatFlag = "table",
) -> None:
    """Measure OUT again, here or on a board, and write verdict, times and samples into it."""

    def body(progress: Progress) -> Outcome:
        from zipc.profiler.device import LocalDevice
        from zipc.profiler.remote import Host, RemoteDevice
        from zipc.validation import validate

        manifest = Manifest.read(out)
        pairs = None
        if max_time is not None:
            pairs = pairs_within(parse_seconds(max_time, "--max-time"), manifest)
        runtime = "onnxruntime"
        board = None if host is None else RemoteDevice(Host(host, host_python), runtime)
        made = validate(out, device=board or LocalDevice(runtime), pairs=pairs, progress=progress)
        return Outcome(
            made.to_json(),
            lambda console: show_manifest(console, made, out=out),
            EXIT_CODES.get(made.verdict, 3),
        )

    run_verb(body, output=format)
