"""`zipc validate`: repeat the proof of a finished compile and write what came out into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipc.cli.bench import measurement
from zipc.cli.compile import verdict_exit_code
from zipc.cli.flags import BuildsFlag, FormatFlag, HostFlag, HostPythonFlag
from zipc.cli.printing import show_manifest
from zipc.cli.running import Outcome, run_verb
from zipc.core.types import Progress


def validate_verb(
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
    """Measure OUT again, here or on a board, and write verdict, times and samples into it."""

    def body(progress: Progress) -> Outcome:
        from zipc.validation import validate

        pairs, device = measurement(out, max_time=max_time, host=host, host_python=host_python)
        made = validate(out, device=device, pairs=pairs, builds=builds, progress=progress)
        return Outcome(
            made.to_json(),
            lambda console: show_manifest(console, made, out=out, python=host_python),
            verdict_exit_code(made.verdict, require=None),
        )

    run_verb(body, output=format)
