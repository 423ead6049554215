"""What `zipc doctor --host` finds on a board."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zipc.cli.doctor import Finding
from zipc.core.errors import RemoteError
from zipc.profiler.remote import LOCAL, Host, RemoteDevice

RUNTIMES = {  # and what has to be there
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "trtexec",
}
BEST = {  # settings under which times are fastest and steady, and how to get there
    "governor": ("performance", "sudo cpupower frequency-set -g performance"),
    "power_mode": ("MAXN", "sudo nvpmodel -m 0 && sudo jetson_clocks, unless this one is meant"),
}
LEAST_GB = 1.0  # for two graphs with their engines


def examine_board(host: Host, *, runtime: str) -> tuple[Finding, ...]:
    """Look at a board: whether ssh gets there, its Python, runtimes, disk, and how it is set up.

    `runtime` is the one that is needed there.
    """
    try:
        seen = RemoteDevice(host, runtime).examine()
    except RemoteError as error:
        return (Finding(f"{host.address}: ssh", "broken", str(error)),)
    found, lacks = seen["found"], seen["lacks"]
    free, place = found.pop("free_gb", None), found.pop("temporary", "")
    findings = (
        Finding("agent" if host.address == LOCAL else "ssh", "ok", "reached"),
        *(_runtime(n, found.pop(n, None), lacks, needed=n == runtime) for n in RUNTIMES),
        _disk(free, place, lacks),
        *(_setting(n, str(value)) for n, value in found.items()),
        *(Finding(n, "ok", str(value)) for n, value in seen["state"].items()),
    )
    return tuple(replace(f, name=f"{host.address}: {f.name}") for f in findings)


def _runtime(name: str, version: Any, lacks: dict[str, Any], *, needed: bool) -> Finding:
    if version is not None:
        return Finding(RUNTIMES[name], "ok", str(version))
    reason = str(lacks.get(name, "not there"))
    return Finding(RUNTIMES[name], "broken" if needed else "optional", reason)


def _disk(free_gb: Any, place: Any, lacks: dict[str, Any]) -> Finding:
    if not isinstance(free_gb, int | float):
        told = lacks.get("temporary", "the board does not say how much is free")
        return Finding("disk", "broken", str(told))
    enough = free_gb >= LEAST_GB
    fix = "" if enough else "make room, or let TMPDIR name a larger disk in its logins"
    return Finding("disk", "ok" if enough else "broken", f"{free_gb} GB free at {place}", fix)


def _setting(name: str, value: str) -> Finding:
    best, fix = BEST.get(name, ("", ""))
    if value.startswith(best):
        return Finding(name, "ok", value)
    return Finding(name, "optional", value, fix)
