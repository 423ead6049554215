"""`zipc targets`: the devices zipc knows by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zipc.cli.flags import FormatFlag
from zipc.cli.printing import show_fields, show_unread
from zipc.cli.running import Outcome, run_verb
from zipc.core.errors import UsageError
from zipc.core.types import Progress
from zipc.targets import (
    NO_KERNELS,
    add_target,
    load_target,
    power_modes,
    shipped_files,
    split_mode,
    target_file,
    target_files,
)

targets_app = typer.Typer(
    help="List and show the devices known by name, and add your own.", no_args_is_help=True
)


@targets_app.command("list")
def list_verb(*, format: FormatFlag = "table") -> None:
    """Print every target: those that come with zipc, and your own."""

    def body(progress: Progress) -> Outcome:
        rows = []
        for name, path in target_files().items():
            try:
                rows.append(_described(name) | {"name": name, "error": None})
            except UsageError as error:
                rows.append({"name": name, "file": str(path), "error": str(error)})
        return Outcome({"targets": rows}, lambda console: _show_list(console, rows))

    run_verb(body, output=format)


@targets_app.command("show")
def show_verb(
    target: Annotated[
        str, typer.Argument(help="Name, or path of a .toml file.", show_default=False)
    ],
    *,
    format: FormatFlag = "table",
) -> None:
    """Print what is known of a target."""

    def body(progress: Progress) -> Outcome:
        document = _described(target)
        return Outcome(document, lambda console: show_fields(console, document))

    run_verb(body, output=format)


@targets_app.command("add")
def add_verb(
    file: Annotated[
        Path,
        typer.Argument(
            help="A .toml file; `zipc targets show cpu` names the one to begin from.",
            metavar="FILE.toml",
            show_default=False,
        ),
    ],
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="Name to keep it under; that of the file, if none.")
    ] = None,
    format: FormatFlag = "table",
) -> None:
    """Check a target file and keep it, so that `--target NAME` finds it."""

    def body(progress: Progress) -> Outcome:
        kept = add_target(file, name=name)
        document = {"name": kept.stem, "file": str(kept)}

        def show(console: Console) -> None:
            console.print(f"kept as {kept}", markup=False, soft_wrap=True)
            console.print(f"next: zipc profile MODEL --target {kept.stem}", markup=False)

        return Outcome(document, show)

    run_verb(body, output=format)


def _described(name: str) -> dict[str, Any]:
    path = target_file(split_mode(name)[0])
    held = dataclasses.asdict(load_target(name))
    return held | {
        "numerics": list(held["numerics"]),
        "patterns": list(held["patterns"]),
        "modes": list(power_modes(path)),
        "file": str(path),
        "shipped": path in shipped_files().values(),
    }


def _show_list(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in (
        "name",
        "runtime",
        "numerics",
        "patterns",
        "largest step",
        "from",
        "description",
    ):
        table.add_column(column, overflow="fold")
    for row in rows:
        if row["error"] is None:
            table.add_row(
                escape(row["name"]),
                escape(row["runtime"]),
                ", ".join(n for n in row["numerics"] if n not in NO_KERNELS[row["runtime"]]),
                ", ".join(row["patterns"]),
                str(row["width_step"]),
                "zipc" if row["shipped"] else escape(row["file"]),
                escape(row["description"]),
            )
    console.print(table)
    show_unread(console, rows)
