"""Engines, by whichever builder of NVIDIA's is here.

`rtx` is TensorRT-RTX, which parses, checks and builds for other GPUs on a machine without one. It
is NVIDIA's own parser, so that a graph it takes obeys TensorRT's rules; it does not prove what
TensorRT 10.3 to 11.4 make of it, and nothing can be read back from the engine. `trt` is the Python
package of TensorRT and `trtexec` its tool: both build for the GPU of this machine, and what they
built is read back.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from zipc.core.engine_options import BY_DEFAULT, EngineOptions
from zipc.core.errors import EngineFailed, UsageError
from zipc.core.files import write_atomic
from zipc.core.types import Workload
from zipc.exporters.tensorrt.driver import local_gpu
from zipc.exporters.tensorrt.profiles import Profile, profiles
from zipc.exporters.tensorrt.readback import read_back
from zipc.exporters.tensorrt.script import SPARSE, TYPING, shape_flags

WORKER = Path(__file__).with_name("worker.py")
BUILDERS = ("trt", "trtexec", "rtx")  # in the order that "auto" tries them
PACKAGES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}
COMPUTE_CAPABILITIES = ("sm80", "sm86", "sm89", "sm120")  # A100; RTX 30, 40 and 50
JETPACK = "/usr/src/tensorrt/bin"  # where JetPack and the containers keep trtexec
BANNER = re.compile(r"TensorRT\.trtexec \[TensorRT v(\d+)\]")
LOOK_S = 0.05  # between looks at what the builder uses
SHOWN = 400  # characters of what TensorRT says


@dataclass(frozen=True, slots=True)
class Engine:
    """A serialised engine. `told` is what it holds, where that could be read back."""

    plan: bytes
    builder: str
    compute_capability: str
    rtx: bool
    told: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = self.told or "not read back, which takes its GPU"
        tail = "".join(f"; {note}" for note in self.notes)
        return f"engine by {self.builder} for {self.compute_capability}, never run: {told}{tail}"


def choose_builder(asked: str, compute_capability: str, options: EngineOptions = BY_DEFAULT) -> str:
    """The builder that was asked for, or with "auto" the first that is here and builds for the GPU.

    Raises:
        UsageError: it is not installed, or does not build for the GPU or with these options.
    """
    names = BUILDERS if asked == "auto" else (asked,)
    reasons = []
    for name in names:
        reason = _missing(name, compute_capability, options)
        if reason is None:
            return name
        reasons.append(reason)
    raise UsageError(
        f"{' '.join(reasons)} Or leave --engine out and run OUT/build.sh on the device."
    )


def _missing(name: str, compute_capability: str, options: EngineOptions) -> str | None:
    """Why a builder cannot build for a GPU; None where it can."""
    if name == "rtx":
        if compute_capability not in COMPUTE_CAPABILITIES:
            known = ", ".join(COMPUTE_CAPABILITIES)
            return f"TensorRT-RTX does not build for {compute_capability}, only for {known}."
        if options.refit or options.version_compatible:
            return (
                "TensorRT-RTX builds no engine to be refitted without a GPU, and its package lacks "
                "the runtime for those of several versions."
            )
        if importlib.util.find_spec("tensorrt_rtx") is None:
            return "TensorRT-RTX is not installed: pip install 'zipc[tensorrt-rtx]'."
        return None
    if name == "trt" and importlib.util.find_spec("tensorrt") is None:
        return "TensorRT's Python package is not installed: pip install tensorrt."
    if name == "trtexec" and _trtexec() is None:
        return f"trtexec, of TensorRT, is neither on PATH nor in {JETPACK}."
    gpu = local_gpu()
    if gpu is None:
        return f"{name} builds for a GPU that is here, and there is none, or no driver for it."
    if gpu.sm != compute_capability:
        return f"{name} builds for the GPU here ({gpu.name}, {gpu.sm}), not {compute_capability}."
    return None


def build_engine(
    model: bytes,
    *,
    builder: str,
    compute_capability: str,
    workload: Workload,
    options: EngineOptions = BY_DEFAULT,
    places: Mapping[str, str] | None = None,
    cache: Path | None = None,
    timeout_s: float = 600.0,
    memory_mb: int = 8192,
) -> Engine:
    """Parse and build an emitted graph, and read the engine back where there is a driver.

    `places` says where in the torch model a node came from (`origin.places`), for errors. `cache`
    is the folder that TensorRT's timings of kernels are kept in, a file for each GPU. The
    builder runs in a process of its own: without a driver it may crash, and it may want any amount
    of time and memory.

    Raises:
        UsageError: the builder is not installed, does not build for the GPU, or the workload does
            not say how large an input is.
        EngineFailed: the parser refuses the graph, or the builder fails, crashes, or goes over a
            limit, or the engine lost precision; names the node where TensorRT does.
    """
    choose_builder(builder, compute_capability, options)
    proto = onnx.load_from_string(model)
    found = profiles(proto, workload)
    limits = Limits(timeout_s, memory_mb)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(model)
        timings = _timings(builder, cache)
        if timings is not None and timings.exists():
            shutil.copyfile(timings, folder / "timing.cache")
        if builder == "trtexec":
            answer = _by_trtexec(folder, found, limits, options)
        else:
            answer = _by_package(folder, builder, compute_capability, found, limits, options)
        plan, layers = folder / "plan", folder / "layers.json"
        if not plan.exists():
            raise EngineFailed(_refusal(answer, proto, places or {}))
        told = None
        if builder != "rtx":
            if not layers.exists():
                raise EngineFailed(_unreadable(answer))
            lines = answer["log"] + answer["told"]
            told = str(read_back(layers.read_text(), lines, proto, places or {}))
            if timings is not None and (folder / "timing.cache").exists():
                write_atomic(timings, (folder / "timing.cache").read_bytes())
        return Engine(
            plan.read_bytes(),
            answer["name"],
            compute_capability,
            builder == "rtx",
            told,
            tuple(answer["notes"]),
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a builder may take."""

    timeout_s: float
    memory_mb: int


def _by_package(
    folder: Path,
    builder: str,
    compute_capability: str,
    found: Mapping[str, Profile],
    limits: Limits,
    options: EngineOptions,
) -> dict[str, Any]:
    flags = {"REFIT": options.refit, "VERSION_COMPATIBLE": options.version_compatible}
    request = {
        "package": PACKAGES[builder],
        "compute_capability": compute_capability,
        "profiles": {n: (p.least, p.most) for n, p in found.items()},
        "flags": [name for name, asked in flags.items() if asked],
        "level": options.level,
    }
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(WORKER), str(folder)]
    code = run_limited(command, log=folder / "log", limits=limits)
    if code:
        raise EngineFailed(
            f"The TensorRT builder ended with {code}. It last said: {_last_words(folder / 'log')}"
        )
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    product = "TensorRT-RTX" if builder == "rtx" else "TensorRT"
    return answer | {"name": f"{product} {answer['version']}"}


def _by_trtexec(
    folder: Path, found: Mapping[str, Profile], limits: Limits, options: EngineOptions
) -> dict[str, Any]:
    version = trtexec_version()
    flags = TYPING.get(version.partition(".")[0])
    if flags is None:
        raise UsageError(f"trtexec is of TensorRT {version}; these graphs are for 10 and 11.")
    command = [
        str(_trtexec()),
        f"--onnx={folder / 'model.onnx'}",
        f"--saveEngine={folder / 'plan'}",
        f"--timingCacheFile={folder / 'timing.cache'}",
        f"--exportLayerInfo={folder / 'layers.json'}",
        *flags,
        SPARSE,
        *shape_flags(found),
        *options.flags,
        "--profilingVerbosity=detailed",
        "--verbose",
        "--skipInference",
    ]
    code = run_limited(command, log=folder / "log", limits=limits)
    lines = (folder / "log").read_text(errors="replace").splitlines()
    errors = [line for line in lines if "[E]" in line]
    if code:
        (folder / "plan").unlink(missing_ok=True)
    return {
        "name": f"trtexec of TensorRT {version}",
        "parser": [],
        "log": errors or lines[-1:],
        "told": lines,
        "notes": [],
    }


def _trtexec() -> str | None:
    return shutil.which("trtexec") or shutil.which("trtexec", path=JETPACK)


def trtexec_version() -> str:
    """The version of TensorRT that the trtexec here is of, "10.16.2".

    Raises:
        EngineFailed: it does not say.
    """
    tool = str(_trtexec())
    try:
        said = subprocess.run([tool, "--help"], check=False, capture_output=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineFailed(f"{tool} does not start: {error}. Install TensorRT again.") from error
    banner = BANNER.search(said.decode(errors="replace"))
    if banner is None:
        raise EngineFailed(f"{tool} does not say which TensorRT it is of. Install TensorRT again.")
    number = int(banner[1])
    wide = 100 if number >= 10_000 else 10  # before TensorRT 10 the minor version had one digit
    return f"{number // (100 * wide)}.{number // 100 % wide}.{number % 100}"


def _timings(builder: str, cache: Path | None) -> Path | None:
    """The file for timings of kernels: they hold for one GPU, and one version of TensorRT.

    Its package refuses those of another; trtexec may not, and has a file for each.
    """
    gpu = None if builder == "rtx" or cache is None else local_gpu()
    if gpu is None or cache is None:
        return None
    version = trtexec_version() if builder == "trtexec" else "python"
    return cache / (re.sub(r"[^\w.-]", "_", f"{version}-{gpu.name}-{gpu.sm}") + ".cache")


def run_limited(command: list[str], *, log: Path, limits: Limits) -> int:
    """Run a builder to its end and return its exit code; what it prints goes to `log`.

    Raises:
        EngineFailed: it crashed, or went over a limit.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        deadline, reason = time.monotonic() + limits.timeout_s, ""
        try:
            while not reason:
                try:
                    process.wait(LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() > deadline:
                        reason = f"took more than {limits.timeout_s:g} s"
                    elif _resident_mb(process.pid) > limits.memory_mb:
                        reason = f"wanted more than {limits.memory_mb} MB of memory"
        finally:
            process.kill()
            process.wait()
    code = process.returncode
    if reason:
        raise EngineFailed(f"The TensorRT builder {reason}. Give a smaller workload.")
    if code < 0:
        raise EngineFailed(
            f"The TensorRT builder crashed ({signal.Signals(-code).name}). "
            f"It last said: {_last_words(log)}"
        )
    return code


def _last_words(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-SHOWN:] or "nothing"


def _resident_mb(pid: int) -> float:
    """Memory a process holds; 0 once it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * 4096 / 1e6


def _unreadable(answer: dict[str, Any]) -> str:
    said = " ".join(" ".join(answer["log"]).split())[:SHOWN] or "nothing"
    return (
        f"{answer['name']} built an engine that it cannot read back, so that lost precision would "
        f"go unseen. It said: {said}"
    )


def _refusal(answer: dict[str, Any], proto: onnx.ModelProto, places: Mapping[str, str]) -> str:
    """What TensorRT says is wrong, and where in the model that is."""
    operators = {n.name: n.op_type for n in proto.graph.node}
    if answer["parser"]:
        first = answer["parser"][0]
        node, operator, said = first["node"], first["operator"], first["message"]
    else:
        said = " ".join(answer["log"]) or "nothing"
        node = max((n for n in operators if n and n in said), key=len, default="")
        operator = operators.get(node, "")
    place = places.get(node, "")
    where = f" at {operator} node {node!r}" + (f", {place}" if place else "") if node else ""
    advice = "Rewrite that part of the model."
    if operator in ("QuantizeLinear", "DequantizeLinear"):
        advice = f"Leave it in fp16 with --exclude '{place.rpartition(' of ')[2]}'."
    return (
        f"{answer['name']} does not take the graph{where}: "
        f"{' '.join(said.split())[:SHOWN]} {advice}"
    )
