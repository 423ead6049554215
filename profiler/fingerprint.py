"""What this device is (its fingerprint) and what it is doing right now (its state).

The fingerprint holds only what invalidates prices when it changes; clocks, load and temperature go
to the state, which is recorded beside a table and never compared.
"""

from __future__ import annotations

from typing import Any

from zipc.core.errors import UsageError
from zipc.profiler.facts import Failure, fingerprint, state


def device_fingerprint(*, runtime: str) -> dict[str, Any]:
    """Describe the device and runtime by what their prices depend on. Takes milliseconds.

    Raises:
        UsageError: the runtime is unknown or not installed.
    """
    try:
        return fingerprint(runtime)
    except Failure as failure:
        raise UsageError(str(failure)) from failure


def device_state() -> dict[str, Any]:
    """Read what changes by the minute: clocks, load, temperatures. Unreadable parts are absent."""
    return state()
