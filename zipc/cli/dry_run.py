"""`--dry-run`: check a request as far as that costs nothing, and print it."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from zipc.cli.running import Outcome
from zipc.core.request import Request
from zipc.core.types import Target
from zipc.targets import requested_target


def dry_run(request: Request) -> Outcome:
    """Load the target and read the data of `request`; nothing is measured or written.

    Raises:
        UsageError: there is no such target, the data cannot be used, or two wishes contradict
            each other.
    """
    target = requested_target(request)
    if request.engine is not None and target.sheet is not None:
        from zipc.exporters.tensorrt.engine import choose_builder

        choose_builder(request.engine, target.sheet.sm)
    if request.host is not None:
        _check_host(target, request)
    data = None if request.data is None else _describe_data(request)
    asked = {k: _plain(v) for k, v in dataclasses.asdict(request).items()}
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
            if value not in (None, [], False):
                table.add_row(name, escape(str(value)))
        if request.runtime is None:
            table.add_row("runtime", target.runtime)
        if data is not None:
            table.add_row("data, splits", escape(data))
        console.print(table)
        console.print("dry run: nothing was measured or written")

    return Outcome(document, show)


def _check_host(target: Target, request: Request) -> None:
    from zipc.devices import open_device

    open_device(target, request.host, python=request.host_python)


def _describe_data(request: Request) -> str:
    from zipc.samples import describe_data

    return describe_data(request)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, bool | int | float | None) else str(value)
