"""Times graphs on the machine it runs on, and says what that machine is.

One file for this machine and for a board over ssh: it is sent as text to a Python of 3.8 or newer,
needs nothing beside the standard library to start, and times with the runtime and numpy it finds
there. Commands come on standard input, each a line of JSON followed by as
many bytes as it says; each is answered by one line of JSON.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from time import perf_counter_ns
from typing import Any, BinaryIO

GREETING = "zipc-agent-3"  # raised with every change of what is said
MAX_ID = 8  # random token ids stay below the size of any vocabulary (those of letters have ~30)
PROVIDERS = ["CPUExecutionProvider"]
TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}  # those that time graphs here
PRECISION = "INFERENCE_PRECISION_HINT"
DISTRIBUTIONS = {
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
DEVFREQ_FOLDER = Path("/sys/class/devfreq")
BOARD_MODEL = Path("/proc/device-tree/model")
L4T_RELEASE = Path("/etc/nv_tegra_release")
MACHINE_ID = Path("/etc/machine-id")


class Failure(Exception):
    """A command could not be done; `kind` is the error the other side raises for it."""

    def __init__(self, message: str, kind: str = "ExportMismatch") -> None:
        super().__init__(message)
        self.kind = kind


def serve(commands: BinaryIO, answers: BinaryIO) -> None:
    """Answer commands until there are no more."""
    _say(answers, {GREETING: platform.python_version()})
    agent = Agent()
    for line in iter(commands.readline, b""):
        command = json.loads(line)
        content = _read_exactly(commands, command["bytes"])
        try:
            answer = {"value": agent.answer(command, content)}
        except Failure as failure:
            answer = {"error": str(failure), "kind": failure.kind}
        _say(answers, answer)


class Agent:
    """The graphs held between commands."""

    def __init__(self) -> None:
        self._graphs: dict[int, Session] = {}

    def answer(self, command: dict[str, Any], content: bytes) -> Any:
        for dropped in command["drop"]:
            self._graphs.pop(dropped, None)
        what = command["do"]
        if what == "load":
            graph = Session(
                content, command["options"], command["inputs"], runtime=command["runtime"]
            )
            self._graphs[command["graph"]] = graph
            return None
        if what == "run":
            return self._graphs[command["graph"]].run()
        if what == "series":
            runs = [self._graphs[number].run for number in command["graphs"]]
            return alternate(runs, rounds=command["rounds"], untimed=command["untimed"])
        if what == "fingerprint":
            return {**fingerprint(command["runtime"]), "machine": machine()}
        if what == "state":
            return state()
        raise Failure(f"There is no command {what!r}.", "RemoteError")


class Session:
    """A graph in a runtime, fed with inputs of given shapes."""

    def __init__(
        self,
        model: bytes,
        options: dict[str, Any],
        inputs: dict[str, dict[str, Any]],
        *,
        runtime: str,
    ) -> None:
        title = TITLES[runtime]
        self._runtime = runtime
        try:
            self._session = (
                OpenVinoSession(model, options)
                if runtime == "openvino"
                else open_session(model, options)
            )
        except ImportError as error:
            raise Failure(
                f"{sys.executable} has no {title} ({error}). Run there: {sys.executable} "
                f"-m pip install {runtime}; or name a Python that has it with --host-python.",
                "RemoteError",
            ) from error
        except Failure:
            raise
        except Exception as error:  # errors of runtimes share no base
            raise Failure(
                f"{title} {_version(runtime)} cannot load the graph: {one_line(error)}. "
                f"Export it again, or install the {title} it was made for."
            ) from None
        self._feeds = {
            name: values(name, wanted["shape"], wanted["dtype"]) for name, wanted in inputs.items()
        }

    def run(self) -> float:
        """Do one inference and return its milliseconds."""
        try:
            return one_inference(self._session, self._feeds)
        except Exception as error:  # errors of runtimes share no base
            raise Failure(
                f"{TITLES[self._runtime]} {_version(self._runtime)} cannot run the graph: "
                f"{one_line(error)}. "
                "A sequence may be longer than the graph takes: give a smaller --sequence-length."
            ) from None


def alternate(
    runs: Sequence[Callable[[], float]],
    *,
    rounds: int,
    untimed: int,
    on_round: Callable[[], object] | None = None,
) -> list[list[float]]:
    """Call timed functions in turns and return what each gave, in order.

    Each kept time directly follows `untimed` calls of the same function, so that the cache is its
    own; every other round goes backwards, so that a drift favours nobody.
    """
    samples: list[list[float]] = [[] for _ in runs]
    with no_collection():
        for number in range(rounds):
            order = range(len(runs))
            for index in order if number % 2 == 0 else reversed(order):
                for _ in range(untimed):
                    runs[index]()
                samples[index].append(runs[index]())
            if on_round is not None:
                on_round()
    return samples


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector out of what is timed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def open_session(model: Any, options: Mapping[str, Any]) -> Any:
    """Open an ONNX Runtime session of a path or bytes; `session.` entries are configuration."""
    import onnxruntime as ort

    opened = ort.SessionOptions()
    opened.log_severity_level = 4  # errors are raised, and need no second voice
    for key, value in options.items():
        if key.startswith("session."):
            opened.add_session_config_entry(key, value)
        else:
            setattr(opened, key, value)
    return ort.InferenceSession(model, opened, providers=PROVIDERS)


class OpenVinoSession:
    """A graph that OpenVINO has compiled for the CPU; it is run as an ONNX Runtime session is."""

    def __init__(self, model: Any, options: Mapping[str, Any]) -> None:
        import openvino

        core = openvino.Core()
        self.compiled = core.compile_model(core.read_model(model), "CPU", dict(options))
        wanted = options[PRECISION]
        found = self.compiled.get_property(PRECISION)
        if found != getattr(openvino.Type, wanted):
            raise Failure(
                f"OpenVINO {_version('openvino')} was asked for {wanted} and computes in "
                f"{found.get_type_name()}: its times would be of another network. Use --runtime "
                "onnxruntime."
            )
        # A value may have further names; those of inputs that nothing reads are gone.
        self.inputs = [port.get_node().get_friendly_name() for port in self.compiled.inputs]
        self._request = self.compiled.create_infer_request()

    def run(self, _: None, feeds: Mapping[str, Any]) -> None:
        """Do one inference; nothing is copied, in or out."""
        taken = [feeds[name] for name in self.inputs]
        self._request.infer(taken, share_inputs=True, share_outputs=True)


def one_inference(session: Any, feeds: Mapping[str, Any]) -> float:
    """Run a session once; milliseconds."""
    start = perf_counter_ns()
    session.run(None, feeds)
    return (perf_counter_ns() - start) / 1e6


def values(name: str, shape: Sequence[int], dtype: str, seed: int = 0) -> Any:
    """Make the data of an input as a numpy array; it depends on its name and the seed only."""
    import numpy as np

    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    kind = np.dtype(dtype)
    if np.issubdtype(kind, np.floating) and "mask" not in name:
        return rng.standard_normal(shape).astype(kind)
    if "mask" in name:
        return np.ones(shape, kind)
    if name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1], dtype=kind), shape).copy()
    if name.endswith("ids") and name != "token_type_ids":
        return rng.integers(1, MAX_ID, shape).astype(kind)
    return np.zeros(shape, kind)


def one_line(error: object, *, longest: int = 300) -> str:
    """What a runtime says, without line breaks, and without the middle where it is long.

    It begins with the node and ends with the reason; between them lie signatures of its own code.
    """
    text = " ".join(str(error).split()).rstrip(". ")
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


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
        "runtime_version": _version(runtime),
    }
    more = {
        "governor": _read(CPU_FOLDER / "cpu0/cpufreq/scaling_governor"),
        "board": (_read(BOARD_MODEL) or "").rstrip("\0") or None,
        "l4t": _l4t(),
        "power_mode": _power_mode(),
        "gpu": _nvidia_smi("name,driver_version") if runtime == "tensorrt" else None,
    }
    return {**stable, **{name: value for name, value in more.items() if value}}


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


def _version(runtime: str) -> str:
    if runtime not in DISTRIBUTIONS:
        raise Failure(
            f"Unknown runtime '{runtime}'. Choose one of: {', '.join(DISTRIBUTIONS)}.", "UsageError"
        )
    for distribution in DISTRIBUTIONS[runtime]:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    raise Failure(
        f"Runtime '{runtime}' is not installed for {sys.executable}. Run: {sys.executable} -m "
        f"pip install {runtime}",
        "UsageError",
    )


def _l4t() -> str | None:
    """The release of Jetson Linux, e.g. `R36.4.0`."""
    found = re.search(r"# (R\d+) \(release\), REVISION: ([\d.]+)", _read(L4T_RELEASE) or "")
    return f"{found[1]}.{found[2]}" if found else None


def _power_mode() -> str | None:
    """A Jetson's power mode, e.g. `MAXN`."""
    found = re.search(r"NV Power Mode: *(\S+)", _printed("nvpmodel", "-q") or "")
    return found[1] if found else None


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


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError("the connection ended in the middle of a graph")
    return content


def _say(stream: BinaryIO, document: dict[str, Any]) -> None:
    stream.write(json.dumps(document).encode() + b"\n")
    stream.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, EOFError, KeyboardInterrupt):
        answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # whatever a library prints must not look like an answer
        serve(sys.stdin.buffer, answers)
