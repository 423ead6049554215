"""`zipc`: the verbs in one literal list, and what happens before any of them runs."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import typer

import zipc
from zipc.cli import bench, check, compile, doctor, inspect, plan, profile, validate
from zipc.cli.running import error_document, print_json
from zipc.cli.tables import tables_app
from zipc.cli.targets import targets_app

app = typer.Typer(
    name="zipc",
    help="Compile a network to a speedup that was measured on the device it is for.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    compile.compile_verb,
    plan.plan_verb,
    profile.profile_verb,
    bench.bench_verb,
    validate.validate_verb,
    inspect.inspect_verb,
    check.check_verb,
    doctor.doctor_verb,
):
    app.command(verb.__name__.removesuffix("_verb"))(verb)
app.add_typer(targets_app, name="targets")
app.add_typer(tables_app, name="tables")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; a bad command line is code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _make_streams_safe()
    try:
        code = typer.main.get_command(app).main(given, prog_name="zipc", standalone_mode=False)
    except typer.Abort:
        code = 130
    except typer.TyperException as error:
        code = error.exit_code
        context = getattr(error, "ctx", None)
        _report_bad_usage(
            error.format_message(),
            command=context.command_path if context else "zipc",
            as_json=_wants_json(given),
        )
    sys.exit(code or 0)


def _make_streams_safe() -> None:
    """Print "?" where a terminal has no such letter, and nothing where a stream was closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif name == "stdout" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _report_bad_usage(message: str, *, command: str, as_json: bool) -> None:
    if as_json:
        print_json(error_document("UsageError", message, exit_code=2))
    elif message:
        print(f"zipc: {message}\nRun: {command} --help", file=sys.stderr)


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line that could not be parsed asked for JSON."""
    return "--format=json" in arguments or ("--format", "json") in pairwise(arguments)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"zipc {zipc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile a network to a speedup that was measured on the device it is for."""
