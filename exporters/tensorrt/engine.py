"""Engines by TensorRT-RTX, which parses, checks and builds for other GPUs on a machine without one.

It is NVIDIA's own parser, so that a graph it takes obeys TensorRT's rules; it does not prove what
TensorRT 10.3 to 11.4 make of it, and nobody has run the engine.
"""

from __future__ import annotations

import importlib.util
import json
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

from zipc.core.errors import EngineFailed, UsageError
from zipc.core.types import Workload
from zipc.exporters.tensorrt.profiles import profiles

WORKER = Path(__file__).with_name("rtx_worker.py")
COMPUTE_CAPABILITIES = ("sm80", "sm86", "sm89", "sm120")  # A100; RTX 30, 40 and 50
LOOK_S = 0.05  # between looks at what the builder uses
SHOWN = 400  # characters of what TensorRT says


@dataclass(frozen=True, slots=True)
class Engine:
    """A serialised engine. `validated`: it has run on the GPU it is for."""

    plan: bytes
    builder: str
    compute_capability: str
    validated: bool = False


def build_engine(
    model: bytes,
    *,
    compute_capability: str,
    workload: Workload,
    places: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    memory_mb: int = 8192,
) -> Engine:
    """Parse and build an emitted graph for a GPU that need not be here.

    `places` says where in the torch model a node came from (`origin.places`), for errors. The
    builder runs in a process of its own: without a driver it may crash, and it may want any amount
    of time and memory.

    Raises:
        UsageError: TensorRT-RTX is not installed, does not know the GPU, or the workload does not
            say how large an input is.
        EngineFailed: the parser refuses the graph, or the builder fails, crashes, or goes over a
            limit; names the node where TensorRT does.
    """
    check_builder(compute_capability)
    proto = onnx.load_from_string(model)
    request = {
        "compute_capability": compute_capability,
        "profiles": {n: (p.least, p.most) for n, p in profiles(proto, workload).items()},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(model)
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, str(WORKER), name]
        run_limited(command, log=folder / "log", timeout_s=timeout_s, memory_mb=memory_mb)
        answer = json.loads((folder / "answer.json").read_text())
        plan = folder / "plan"
        if not plan.exists():
            raise EngineFailed(_refusal(answer, proto, places or {}))
        builder = f"TensorRT-RTX {answer['version']}"
        return Engine(plan.read_bytes(), builder, compute_capability)


def check_builder(compute_capability: str) -> None:
    """Refuse what `build_engine` could not build, before anything is loaded.

    Raises:
        UsageError: TensorRT-RTX is not installed or does not know the GPU.
    """
    if compute_capability not in COMPUTE_CAPABILITIES:
        raise UsageError(
            f"TensorRT-RTX does not build for {compute_capability}, only for "
            f"{', '.join(COMPUTE_CAPABILITIES)}. Leave --engine out and run OUT/build.sh on the "
            "device."
        )
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise UsageError("TensorRT-RTX is not installed. Run: pip install 'zipc[tensorrt-rtx]'")


def run_limited(command: list[str], *, log: Path, timeout_s: float, memory_mb: int) -> None:
    """Run a builder to its end; what it prints goes to `log`.

    Raises:
        EngineFailed: it ended with an error or a crash, took longer than `timeout_s`, or held more
            than `memory_mb` of memory.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        deadline, reason = time.monotonic() + timeout_s, ""
        try:
            while not reason:
                try:
                    process.wait(LOOK_S)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() > deadline:
                        reason = f"took more than {timeout_s:g} s; allow it more"
                    elif _resident_mb(process.pid) > memory_mb:
                        reason = f"wanted more than {memory_mb} MB of memory; allow it more"
        finally:
            process.kill()
            process.wait()
    code = process.returncode
    if reason:
        raise EngineFailed(f"The TensorRT builder {reason}, or give a smaller workload.")
    if code:
        how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
        said = log.read_text(errors="replace").strip()[-SHOWN:] or "nothing"
        raise EngineFailed(f"The TensorRT builder {how}. It last said: {said}")


def _resident_mb(pid: int) -> float:
    """Memory a process holds; 0 once it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * 4096 / 1e6


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
        f"TensorRT-RTX {answer['version']} does not take the graph{where}: "
        f"{' '.join(said.split())[:SHOWN]} {advice}"
    )
