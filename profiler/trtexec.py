"""Builds engines with TensorRT's trtexec and times them, on the machine the agent runs on.

Sent there with `agent.py`: Python 3.8 and the standard library are all it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import importlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zipc.profiler.agent import MAX_ID
from zipc.profiler.facts import Failure, one_line, room, temporary

PLACES = ("/usr/src/tensorrt/bin/trtexec", "/opt/tensorrt/bin/trtexec")  # where NVIDIA puts it
FOLDER = "zipc-trtexec"
FEWEST_RUNS = 10  # of an invocation
SHORTEST_POLL_S, LONGEST_POLL_S = 0.005, 0.1
BY_PYTHON = "there is no trtexec: TensorRT's Python package built the engines and timed them"
SPARE = 4  # engines that nothing uses any more, and that may be asked for again
PR_SET_PDEATHSIG = 1
SHORT = "memory was short while an engine was built: faster kernels may have been passed over"
SIGNS = {  # what trtexec goes on after, and what is then no longer so
    "not permitted under CUDA graph capture": "an engine cannot be captured as a CUDA graph: its "
    "launches are timed too",
    "insufficient to use tactic": SHORT,
    "insufficient memory on requested size": SHORT,
    "OutOfMemory": SHORT,
    "out of memory": SHORT,
}
NO_GPU = ("Cuda failure", "CUDA initialization failure", "no CUDA-capable device")
CONSEQUENCES = (  # of the error that was told before
    "Failed to parse onnx file",
    "Parsing model failed",
    "Failed to create engine",
    "Engine could not be created",
    "Building engine failed",
    "Engine set up failed",
    "Inference set up failed",
    "Begin node ---",
    "End node ---",
)


class TensorRt:
    """Engines in a folder of their own, which goes with `close` or the process.

    `hung_up` waits so many seconds and says whether nobody waits for an answer any more.

    Raises:
        Failure: there is no trtexec, or it does not say its version.
        OSError: no folder can be made.
    """

    def __init__(self, hung_up: Callable[[float], bool]) -> None:
        self._program = find()
        self.version = version(self._program)
        self.warnings = [BY_PYTHON] if len(self._program) > 1 else []
        self._hung_up = hung_up
        _clear_leftovers()
        self._users: Counter[Path] = Counter()
        self._idle: list[Path] = []
        self._folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}-{os.getpid()}-", dir=temporary()))

    def close(self) -> None:
        shutil.rmtree(str(self._folder), ignore_errors=True)

    def load(
        self, model: bytes, recipe: dict[str, Any], inputs: dict[str, dict[str, Any]]
    ) -> Engine:
        """Build the engine of a graph; the same graph with the same flags is built once.

        Its file goes some time after the last that uses it: those of a sweep would fill a disk.
        `recipe` has the flags of building and timing by major version of TensorRT. Where it names
        an `attempt`, nothing is taken over from earlier builds: what differs then is luck.
        """
        major = str(self.version[0])
        if major not in recipe["build"]:
            raise Failure(
                f"{self._program[0]} is of TensorRT {dotted(self.version)}, and the graph is for "
                f"{' and '.join(recipe['build'])}.",
                "RemoteError",
            )
        flags, attempt = [*recipe["build"][major], *recipe["shapes"]], recipe.get("attempt")
        if attempt is None:
            flags.append(f"--timingCacheFile={self._folder / 'timing.cache'}")
        name = hashlib.sha256(model + json.dumps([*flags, attempt]).encode()).hexdigest()[:24]
        engine = self._folder / f"{name}.engine"
        if engine in self._idle:
            self._idle.remove(engine)
        if not engine.is_file():
            self._build(model, engine, flags)
        feeds = [f"{n}:{self._data(n, i)}" for n, i in inputs.items() if "float" not in i["dtype"]]
        data = [f"--loadInputs={','.join(feeds)}"] if feeds else []
        shapes = ",".join(f"{n}:{'x'.join(map(str, i['shape']))}" for n, i in inputs.items())
        given = [f"--shapes={shapes}"] if recipe["shapes"] else []
        flags = [f"--loadEngine={engine}", *given, *data, *recipe["time"][major]]
        made = Engine(self, flags, engine.with_suffix(".json"))
        self._users[engine] += 1
        weakref.finalize(made, self._leave, engine).atexit = False
        return made

    def times(self, engine: Sequence[str], *, count: int) -> list[float]:
        """GPU compute milliseconds of `count` consecutive inferences after the warm-up."""
        exported = self._folder / "times.json"
        with contextlib.suppress(FileNotFoundError):
            exported.unlink()
        runs = max(count, FEWEST_RUNS)
        log = self._run(
            *engine, "--duration=0", f"--iterations={runs}", f"--exportTimes={exported}"
        )
        try:
            found = [float(run["computeMs"]) for run in json.loads(exported.read_bytes())]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Failure(
                f"trtexec's times cannot be read ({one_line(error)}): {_reason(log)}. {room()}",
                "RemoteError",
            ) from error
        if len(found) < count:
            raise Failure(f"trtexec gave {len(found)} times of {count}.", "RemoteError")
        return found[-count:]

    def _leave(self, engine: Path) -> None:
        self._users[engine] -= 1
        if self._users[engine]:
            return
        self._idle.append(engine)
        for old in self._idle[:-SPARE]:
            for path in (old, old.with_suffix(".json")):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
        del self._idle[:-SPARE]

    def _build(self, model: bytes, engine: Path, flags: Sequence[str]) -> None:
        source = engine.with_suffix(".onnx")
        try:
            source.write_bytes(model)
            log = self._run(
                f"--onnx={source}",
                f"--saveEngine={engine}",
                f"--exportLayerInfo={engine.with_suffix('.json')}",
                "--profilingVerbosity=detailed",
                "--skipInference",
                *flags,
            )
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                engine.unlink()
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                source.unlink()
        if not engine.is_file():
            raise Failure(f"trtexec wrote no engine: {_reason(log)}.", "RemoteError")

    def _run(self, *arguments: str) -> str:
        """Run trtexec and return what it printed; it ends with whoever waits for it."""
        with open(str(self._folder / "log"), "w+b") as kept:
            process = subprocess.Popen(
                [*self._program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=kept,
                stderr=subprocess.STDOUT,
                cwd=str(self._folder),
                preexec_fn=_end_with_parent,
            )
            try:
                pause = SHORTEST_POLL_S
                while process.poll() is None:
                    pause = min(2 * pause, LONGEST_POLL_S)
                    if self._hung_up(pause):
                        raise EOFError("nobody waits for this any more")
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
            kept.seek(0)
            log = kept.read().decode(errors="replace")
        if process.returncode:
            raise self._failure(process.returncode, log)
        for sign, meaning in SIGNS.items():
            if sign in log and meaning not in self.warnings:
                self.warnings.append(meaning)
        return log

    def _failure(self, code: int, log: str) -> Failure:
        reason = _reason(log)
        if any(sign in log for sign in NO_GPU):
            told = f"TensorRT finds no GPU it can use ({reason}). Run nvidia-smi there."
        elif "Saving engine to file failed" in log:
            told = f"trtexec could not write its engine. {room()}"
        elif code < 0:
            told = f"trtexec was ended by signal {-code}; the board may be short of memory."
        else:
            refused = f"TensorRT {dotted(self.version)} refuses the graph: {reason}."
            return Failure(refused, "EngineFailed")
        return Failure(told, "RemoteError")

    def _data(self, name: str, wanted: dict[str, Any]) -> Path:
        """A file of values for an input of integers: trtexec's own are no token ids."""
        path = self._folder / hashlib.sha256(json.dumps([name, wanted]).encode()).hexdigest()[:24]
        size = {"int64": 8, "int32": 4}.get(wanted["dtype"], 1)
        numbers = integers(name, wanted["shape"])
        path.write_bytes(b"".join(n.to_bytes(size, "little") for n in numbers))
        return path


class Engine:
    """An engine on disk. An invocation of trtexec takes seconds, so that it gives several runs."""

    def __init__(self, tensorrt: TensorRt, arguments: Sequence[str], layers: Path) -> None:
        self._tensorrt = tensorrt
        self._arguments = arguments
        self._layers = layers
        self._ready: list[float] = []

    def run(self) -> float:
        if not self._ready:
            self._ready = self.times(FEWEST_RUNS)
        return self._ready.pop(0)

    def layers(self) -> str:
        """What its layers are and compute in, as TensorRT's inspector writes it."""
        try:
            return self._layers.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError as error:
            raise Failure("trtexec does not say what is in its engine.", "RemoteError") from error

    def times(self, count: int) -> list[float]:
        return self._tensorrt.times(self._arguments, count=count)

    @staticmethod
    def series(graphs: Sequence[Engine], *, rounds: int, untimed: int) -> list[list[float]]:
        """Two turns of each graph, the second in opposite order; each begins with a warm-up."""
        first = (rounds + 1) // 2
        samples = [graph.times(first) for graph in graphs]
        for index in reversed(range(len(graphs) if rounds > first else 0)):
            samples[index] += graphs[index].times(rounds - first)
        return samples


def find() -> list[str]:
    """The command that is this machine's trtexec, or stands for it by TensorRT's Python package."""
    found = shutil.which("trtexec") or next((p for p in PLACES if os.access(p, os.X_OK)), None)
    if found is not None:
        return [found]
    if importlib.util.find_spec("tensorrt") is not None:
        return [sys.executable, "-c", _stand_in()]
    raise Failure(
        "There is no trtexec, on the PATH or where NVIDIA puts it, and no TensorRT for "
        f"{sys.executable}. Run there: apt-get install libnvinfer-bin (on a Jetson: "
        "nvidia-tensorrt), or pip install tensorrt.",
        "RemoteError",
    )


def _stand_in() -> str:
    module = importlib.import_module("zipc.profiler.tensorrt_python")
    if "SOURCE" in vars(module):  # where it was sent as text
        return str(vars(module)["SOURCE"])
    assert module.__file__ is not None
    return Path(module.__file__).read_text(encoding="utf-8")


def version(program: Sequence[str]) -> tuple[int, ...]:
    """Major, minor, patch; it prints them as `[TensorRT v100300]`, before 10 as `v8601`."""
    try:
        done = subprocess.run(
            [*program, "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Failure(f"{program[0]} does not start: {one_line(error)}.", "RemoteError") from error
    told = done.stdout.decode(errors="replace")
    found = re.search(r"\[TensorRT v(\d+)\]", told)
    if found is None:
        raise Failure(f"{program[0]} does not say its version: {one_line(told)}.", "RemoteError")
    number = int(found[1])
    if number < 10000:
        return number // 1000, number // 100 % 10, number // 10 % 10
    return number // 10000, number // 100 % 100, number % 100


def dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def integers(name: str, shape: Sequence[int]) -> list[int]:
    """Values of an input of integers, as `agent.values` makes them but without numpy."""
    count, last = math.prod(shape), shape[-1] if shape else 1
    if "mask" in name:
        return [1] * count
    if name == "position_ids":
        return [i % last for i in range(count)]
    if name.endswith("ids") and name != "token_type_ids":
        rng = random.Random(0)
        return [rng.randrange(1, MAX_ID) for _ in range(count)]
    return [0] * count


def _reason(log: str) -> str:
    """What trtexec calls an error, without what only follows from it; else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    signs = ("[E]", "Error Code", "Invalid Node", *NO_GPU)
    errors = [line for line in lines if any(sign in line for sign in signs)]
    causes = [e for e in errors if not any(follows in e for follows in CONSEQUENCES)]
    told = [re.sub(r"^\[[\d/:-]+\] \[E\] (\[TRT\] )?", "", line) for line in causes or lines[-1:]]
    return one_line("; ".join(told[:4])) or "it printed nothing"


def _clear_leftovers() -> None:
    """Remove the folders of agents that were killed."""
    for folder in glob.glob(os.path.join(temporary(), f"{FOLDER}-*-*")):
        owner = os.path.basename(folder)[len(FOLDER) + 1 :].partition("-")[0]
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent() -> None:
    """Have the kernel end this process with the agent, also where that is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
