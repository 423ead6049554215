"""What the machine is that the agent runs on, how it is set up, and what it is doing right now.

Sent there with `agent.py`: Python 3.8 and the standard library are all it needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "torch": ("torch",),
    "torch-cuda": ("torch",),
}
LEAST = {"onnxruntime": (1, 24), "openvino": (2026, 4)}  # that take the graphs, as pyproject.toml
ON_GPU = ("tensorrt", "torch-cuda")
CAPABILITY = "compute_capability"
PACKAGE = "TensorRT's Python package"  # where there is no trtexec
# Extensions that choose between GEMM kernels, as Linux spells them on x86 and Arm.
ISA_FEATURES = (
    "avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 avx_vnni "
    "amx_tile amx_int8 amx_bf16 amx_fp16 asimd asimddp asimdhp i8mm bf16 sve sve2 sme"
)
CPUINFO = Path("/proc/cpuinfo")
CPU_FOLDER = Path("/sys/devices/system/cpu")
THERMAL_FOLDER = Path("/sys/class/thermal")
DEVFREQ_FOLDER = Path("/sys/class/devfreq")
BOARD_MODEL = Path("/proc/device-tree/model")
L4T_RELEASE = Path("/etc/nv_tegra_release")
MACHINE_ID = Path("/etc/machine-id")


class Failure(Exception):
    """A command could not be done; `kind` is the error the other side raises for it."""

    def __init__(self, message: str, kind: str = "ExportMismatch") -> None:
        super().__init__(message)
        self.kind = kind


def fingerprint(runtime: str) -> dict[str, Any]:
    """What prices depend on; fields that do not apply are left out."""
    cpu = _cpuinfo()
    stable: dict[str, Any] = {
        "cpu": cpu.get("model name") or _cpu_brand(),
        "cpu_id": "/".join(cpu.get(k, "?") for k in ("vendor_id", "cpu family", "model")),
        "isa": sorted(set(ISA_FEATURES.split()).intersection(_offered(cpu))),
        "cores": _usable_processors(),
        "caches": _caches(),
        "arch": platform.machine(),
        "os": platform.system(),
        "runtime": runtime,
        "runtime_version": version_of(runtime),
    }
    if runtime == "tensorrt" and _by_python():
        stable["tool"] = PACKAGE
    return {**stable, **_setup(runtime)}


def machine() -> str:
    """Tells this machine from others of its kind; its id, which is confidential, is hashed."""
    told = _read(MACHINE_ID) or platform.node()
    return hashlib.sha256(f"zipc {told}".encode()).hexdigest()[:12]


def state() -> dict[str, Any]:
    """What changes by the minute: clocks, load, temperatures. Unreadable parts are absent."""
    found: dict[str, Any] = {}
    clock = _cpuinfo().get("cpu MHz")
    khz = _read(CPU_FOLDER / "cpu0/cpufreq/scaling_cur_freq")
    if clock is not None:
        found["cpu_mhz"] = float(clock)
    elif khz is not None and khz.isdigit():
        found["cpu_mhz"] = int(khz) / 1000
    if hasattr(os, "getloadavg"):
        found["load_average"] = [round(load, 2) for load in os.getloadavg()]
    celsius = {}
    for zone in sorted(THERMAL_FOLDER.glob("thermal_zone*")):
        kind, reading = _read(zone / "type"), _read(zone / "temp")
        if kind and reading and reading.lstrip("-").isdigit():
            celsius[f"{zone.name}:{kind}"] = int(reading) / 1000
    if celsius:
        found["temperature_c"] = celsius
    gpu = _nvidia_smi("clocks.sm,temperature.gpu,clocks_throttle_reasons.active")
    if gpu:
        found["gpu"] = gpu
    for device in sorted(DEVFREQ_FOLDER.glob("*gpu*")):  # a Jetson's
        hertz = _read(device / "cur_freq")
        if hertz and hertz.isdigit():
            found["gpu_mhz"] = int(hertz) / 1e6
    return found


def examine() -> dict[str, Any]:
    """What is here to time with, what is lacking, and how this machine is set up."""
    found: dict[str, Any] = {"python": f"{platform.python_version()} ({sys.executable})"}
    lacks = {}
    for runtime in ("onnxruntime", "openvino", "tensorrt"):
        try:
            refuse_old(runtime)
            found[runtime] = version_of(runtime)
        except Failure as failure:
            lacks[runtime] = str(failure)
    if "tensorrt" in found and _by_python():
        found["tool"] = PACKAGE
    found["temporary"] = temporary()
    free = _free_gb()
    if free is None:
        lacks["temporary"] = room()
    else:
        found["free_gb"] = round(free, 2)
    return {"found": {**found, **_setup("tensorrt")}, "lacks": lacks, "state": state()}


def _setup(runtime: str) -> dict[str, str]:
    """What a user can change about a machine; fields that do not apply are left out."""
    more = {
        "governor": _read(CPU_FOLDER / "cpu0/cpufreq/scaling_governor"),
        "board": (_read(BOARD_MODEL) or "").rstrip("\0") or None,
        "l4t": _l4t(),
        "power_mode": _power_mode(),
        "gpu": _nvidia_smi("name,driver_version") if runtime in ON_GPU else None,
        CAPABILITY: _compute_capability() if runtime in ON_GPU else None,
    }
    return {name: value for name, value in more.items() if value}


def temporary() -> str:
    """Where temporary files go; `tempfile` would not name a disk that is full."""
    return os.environ.get("TMPDIR") or "/tmp"


def room() -> str:
    """How much of it there is for temporary files, and how to get more."""
    free = _free_gb()
    if free is None:
        return (
            f"There is no folder {temporary()}, which TMPDIR names in the environment of logins"
            " there: make it, or let TMPDIR name another."
        )
    return (
        f"{temporary()} has {free:.2f} GB free there: make room, or let TMPDIR name a larger disk"
        " in the environment of its logins."
    )


def version_of(runtime: str) -> str:
    """The version of a runtime; that of TensorRT is trtexec's."""
    if runtime == "tensorrt":
        from zipc.profiler.trtexec import dotted, find, version

        return dotted(version(find()))
    if runtime not in DISTRIBUTIONS:
        known = ", ".join((*DISTRIBUTIONS, "tensorrt"))
        raise Failure(f"Unknown runtime '{runtime}'. Choose one of: {known}.", "UsageError")
    for distribution in DISTRIBUTIONS[runtime]:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    raise Failure(
        f"Runtime '{runtime}' is not installed for {sys.executable}. Run there: {sys.executable} "
        f"-m pip install {runtime}; or name a Python that has it with --host-python.",
        "UsageError",
    )


def refuse_old(runtime: str) -> None:
    """Say so where a runtime cannot take the graphs that zipc writes.

    Raises:
        Failure: it is too old.
    """
    least = LEAST.get(runtime)
    if least is None:
        return
    found = version_of(runtime)
    if tuple(int(part) for part in re.findall(r"\d+", found)[: len(least)]) < least:
        raise Failure(
            f"{runtime} {found} is too old for these graphs. Run there: {sys.executable} -m pip "
            f"install '{runtime}>={'.'.join(map(str, least))}'. Where that finds none, Python "
            f"{platform.python_version()} is too old, too: name a newer one with --host-python.",
            "RemoteError",
        )


def _by_python() -> bool:
    """Whether engines are built and timed by the package, for want of a trtexec."""
    from zipc.profiler.trtexec import find

    return len(find()) > 1


def _free_gb() -> float | None:
    """None where there is no such folder."""
    try:
        return shutil.disk_usage(temporary()).free / 1e9
    except OSError:
        return None


def _l4t() -> str | None:
    """The release of Jetson Linux, e.g. `R36.4.0`."""
    found = re.search(r"# (R\d+) \(release\), REVISION: ([\d.]+)", _read(L4T_RELEASE) or "")
    return f"{found[1]}.{found[2]}" if found else None


def _power_mode() -> str | None:
    """A Jetson's power mode, e.g. `MAXN`."""
    found = re.search(r"NV Power Mode: *(\S+)", _printed("nvpmodel", "-q") or "")
    return found[1] if found else None


def _compute_capability() -> str | None:
    """E.g. `8.7`; older drivers and boards of their own do not say."""
    told = _nvidia_smi("compute_cap") or ""
    return told if re.fullmatch(r"\d+\.\d", told) else None


def _nvidia_smi(fields: str) -> str | None:
    told = _printed("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return told.splitlines()[0].strip() if told and "[N/A]" not in told else None


def _printed(*command: str) -> str | None:
    """What a program prints; None where there is none or it fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() or None


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is none."""
    first = (_read(CPUINFO) or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _offered(cpu: dict[str, str]) -> list[str]:
    return (cpu.get("flags") or cpu.get("Features", "")).split()


def _cpu_brand() -> str:
    brand = _printed("sysctl", "-n", "machdep.cpu.brand_string")  # macOS
    return brand or platform.processor() or platform.machine()


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


def one_line(error: object, *, longest: int = 300) -> str:
    """What a runtime says, without line breaks, and without the middle where it is long.

    It begins with the node and ends with the reason; between them lie signatures of its own code.
    """
    text = " ".join(str(error).split()).rstrip(". ")
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"
