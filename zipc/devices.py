"""The device behind a target."""

from __future__ import annotations

from zipc.core.types import Target
from zipc.profiler.device import Device, LocalDevice


def open_device(target: Target) -> Device:
    """Where graphs for this target are timed."""
    return LocalDevice(target.runtime)
