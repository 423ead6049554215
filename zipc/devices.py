"""The device behind a target."""

from __future__ import annotations

from zipc.core.errors import UsageError
from zipc.core.types import Target
from zipc.modelled_device import ModelledDevice
from zipc.profiler.agent import TITLES
from zipc.profiler.device import Device, local_device
from zipc.profiler.remote import Host, RemoteDevice


def open_device(target: Target, host: str | None = None, *, python: str = "python3") -> Device:
    """Where graphs for this target are timed, or whose model says how long they take.

    With a `host` it is that board, through ssh and its `python`; nothing is asked of it yet.

    Raises:
        UsageError: the host cannot be one, or the target's runtime is not timed on boards.
    """
    if host is not None:
        board = Host(host, python)
        if target.runtime not in TITLES:
            raise UsageError(
                f"Boards are timed under {' or '.join(TITLES.values())}, and target "
                f"'{target.name}' runs {target.runtime}. Leave --host out for a predicted verdict, "
                "or give --target cpu."
            )
        return RemoteDevice(board, target.runtime)
    if target.sheet is not None:
        return ModelledDevice.of(target.name, target.sheet)
    return local_device(target.runtime)
