"""The device behind a target."""

from __future__ import annotations

from zipc.core.types import Target
from zipc.modelled_device import ModelledDevice
from zipc.profiler.device import Device, LocalDevice


def open_device(target: Target) -> Device:
    """Where graphs for this target are timed, or whose model says how long they take."""
    if target.sheet is not None:
        return ModelledDevice.of(target.name, target.sheet)
    return LocalDevice(target.runtime)
