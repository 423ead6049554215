"""`--dry-run`: check a request as far as that costs nothing, and print it."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zipc.cli.running import Outcome
from zipc.core.request import Request


def dry_run(request: Request) -> Outcome:
    """Open the target and read the data of `request`; nothing is measured or written.

    Raises:
        RemoteError: the board cannot be reached.
        UsageError: there is no such target or metric, the output cannot be written, the data cannot
            be used, something is not installed, or two wishes contradict each other.
    """
    from zipc.groundwork import open_target
    from zipc.metrics import check_metric
    from zipc.output import check_output

    if request.output is not None:
        check_output(request.output)
    check_metric(request.metric)
    target, _ = open_target(request)
    data = None if request.data is None else _describe_data(request)
    asked = {k: _plain(v) for k, v in dataclasses.asdict(request).items()}
    if request.host is None:
        del asked["host_python"]
    asked["input_shapes"] = [str(spec) for spec in request.input_shapes]
    document = {
        "dry_run": True,
        "request": asked,
        "target": dataclasses.asdict(target),
        "data": data,
    }

    def show(console: Console) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in asked.items():
            if value is not False and value not in (None, [], ""):
                table.add_row(name, escape(str(value)))
        if request.runtime is None:
            table.add_row("runtime", target.runtime)
        if data is not None:
            table.add_row("data, splits", escape(data))
        console.print(table)
        console.print("ok; nothing was measured or written. next: the same without --dry-run")

    return Outcome(document, show)


def _describe_data(request: Request) -> str:
    from zipc.samples import describe_data

    return describe_data(request)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, bool | int | float | None) else str(value)
