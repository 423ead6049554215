"""`zipc inspect`: a finished compile as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipc.cli.flags import FormatFlag
from zipc.cli.printing import show_manifest
from zipc.cli.running import Outcome, run_verb
from zipc.core.types import Progress
from zipc.manifest import Manifest


def inspect_verb(
    out: Annotated[
        Path,
        typer.Argument(help="Folder written by zipc compile.", metavar="OUT", show_default=False),
    ],
    *,
    format: FormatFlag = "table",
) -> None:
    """Print the allocation, sizes and verdict of a finished compile."""

    def body(progress: Progress) -> Outcome:
        manifest = Manifest.read(out)
        return Outcome(
            manifest.to_json(),
            lambda console: show_manifest(console, manifest, out=out, every_site=True),
        )

    run_verb(body, output=format)
