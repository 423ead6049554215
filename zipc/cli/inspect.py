"""`zipc inspect`: a finished compile, a model before it is compiled, or an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipc.cli.flags import (
    ExcludeFlag,
    FormatFlag,
    IncludeFlag,
    InputShapesFlag,
    WeightsFlag,
    read_shapes,
)
from zipc.cli.printing import show_fields, show_manifest, show_structure
from zipc.cli.running import Outcome, run_verb
from zipc.core.errors import CorruptFile
from zipc.core.types import Progress
from zipc.manifest import FILE_NAME, Manifest


def inspect_verb(
    what: Annotated[
        str,
        typer.Argument(
            help="Folder written by zipc compile, a model (as for compile), or a .onnx file.",
            metavar="OUT|MODEL|FILE.onnx",
            show_default=False,
        ),
    ],
    *,
    include: IncludeFlag = None,
    exclude: ExcludeFlag = None,
    weights: WeightsFlag = None,
    input_shapes: InputShapesFlag = None,
    latency: Annotated[
        bool,
        typer.Option(help="Export a model and time it here, for the share of every site."),
    ] = True,
    format: FormatFlag = "table",
) -> None:
    """Print what a compile did, what could be removed from a model, or what an ONNX file holds."""

    def body(progress: Progress) -> Outcome:
        path = Path(what)
        if path.suffix == ".onnx":
            from zipc.inspect import inspect_onnx

            document = inspect_onnx(path)
            return Outcome(document, lambda console: show_fields(console, document))
        if _is_compiled(path):
            manifest = Manifest.read(path)
            out = path.parent if path.name == FILE_NAME else path
            changed = manifest.changed_files(out)
            if changed and path.name != FILE_NAME:
                raise CorruptFile(
                    f"{out} is damaged: {', '.join(changed)} missing or changed after the compile. "
                    "Run the same zipc compile again, or read what it was with: zipc inspect "
                    f"{out / FILE_NAME}"
                )
            return Outcome(
                manifest.to_json(),
                lambda console: show_manifest(console, manifest, out=out, every_site=True),
            )
        from zipc.inspect import inspect_model

        found = inspect_model(
            what,
            include=include or (),
            exclude=exclude or (),
            weights=weights,
            input_shapes=read_shapes(input_shapes),
            measure=latency,
            progress=progress,
        )
        return Outcome(found, lambda console: show_structure(console, found))

    run_verb(body, output=format)


def _is_compiled(path: Path) -> bool:
    """Whether `path` is an output folder, also one that lost its manifest, and not a model."""
    if path.name == FILE_NAME or (path / FILE_NAME).exists():
        return True
    return path.is_dir() and not (path / "config.json").exists()
