"""What a device is (its fingerprint) and what it is doing right now (its state).

The fingerprint holds only what invalidates prices when it changes; clocks, load and temperature go
to the state, which is recorded beside a table and never compared.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zipc.core.errors import UsageError
from zipc.core.processors import usable_processors

RUNTIME_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "torch": ("torch",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
}
# Extensions that choose between GEMM kernels, as Linux spells them on x86 and Arm.
ISA_FEATURES = (
    "avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 avx_vnni "
    "amx_tile amx_int8 amx_bf16 amx_fp16 asimd asimddp asimdhp i8mm bf16 sve sve2 sme"
)
CPUINFO = Path("/proc/cpuinfo")
CPU_FOLDER = Path("/sys/devices/system/cpu")
THERMAL_FOLDER = Path("/sys/class/thermal")


def device_fingerprint(*, runtime: str) -> dict[str, Any]:
    """Describe the device and runtime by what their prices depend on. Takes milliseconds.

    Raises:
        UsageError: the runtime is unknown or not installed.
    """
    cpu = _cpuinfo()
    stable: dict[str, Any] = {
        "cpu": cpu.get("model name") or _cpu_brand(),
        "cpu_id": "/".join(cpu.get(k, "?") for k in ("vendor_id", "cpu family", "model")),
        "isa": _isa_features(cpu),
        "cores": usable_processors(),
        "caches": _caches(),
        "arch": platform.machine(),
        "os": platform.system(),
        "runtime": runtime,
        "runtime_version": _runtime_version(runtime),
    }
    governor = _read(CPU_FOLDER / "cpu0/cpufreq/scaling_governor")
    return stable if governor is None else stable | {"governor": governor}


def device_state() -> dict[str, Any]:
    """Read what changes by the minute: clocks, load, temperatures. Unreadable parts are absent."""
    state: dict[str, Any] = {}
    clock = _cpuinfo().get("cpu MHz")
    if clock is not None:
        state["cpu_mhz"] = float(clock)
    if hasattr(os, "getloadavg"):
        state["load_average"] = [round(load, 2) for load in os.getloadavg()]
    celsius = {}
    for zone in sorted(THERMAL_FOLDER.glob("thermal_zone*")):
        kind, reading = _read(zone / "type"), _read(zone / "temp")
        if kind and reading and reading.lstrip("-").isdigit():
            celsius[f"{zone.name}:{kind}"] = int(reading) / 1000
    if celsius:
        state["temperature_c"] = celsius
    return state


def _runtime_version(runtime: str) -> str:
    if runtime not in RUNTIME_DISTRIBUTIONS:
        known = ", ".join(RUNTIME_DISTRIBUTIONS)
        raise UsageError(f"Unknown runtime '{runtime}'. Choose one of: {known}.")
    for distribution in RUNTIME_DISTRIBUTIONS[runtime]:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise UsageError(f"Runtime '{runtime}' is not installed. Run: pip install {runtime}")


def _isa_features(cpu: dict[str, str]) -> list[str]:
    offered = (cpu.get("flags") or cpu.get("Features", "")).split()
    return sorted(set(ISA_FEATURES.split()).intersection(offered))


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is none."""
    first = (_read(CPUINFO) or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_brand() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def _caches() -> list[str]:
    """Sizes of the first core's caches, innermost first, e.g. `L2 1024K`."""
    found = []
    for index in sorted((CPU_FOLDER / "cpu0/cache").glob("index*")):
        level, size, kind = (_read(index / name) for name in ("level", "size", "type"))
        if level and size and kind != "Instruction":
            found.append(f"L{level} {size}")
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
