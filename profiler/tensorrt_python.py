"""What zipc asks of trtexec, done by TensorRT's Python package: pip installs that one alone.

Run as a script with trtexec's own flags, in a process of its own, for a driver may crash it. It
says and writes what trtexec does. Sent to boards with `agent.py`: Python 3.8 and the package are
all it needs; memory, events and graphs of CUDA are those of the runtime library that it brings.
"""

from __future__ import annotations

import array
import ctypes
import glob
import importlib
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

FLAGS = {  # of building an engine, and of timing it; others are refused, as by trtexec
    *("onnx", "saveEngine", "exportLayerInfo", "profilingVerbosity", "skipInference"),
    *("stronglyTyped", "minShapes", "optShapes", "maxShapes", "sparsity", "timingCacheFile"),
    *("loadEngine", "shapes", "loadInputs", "exportTimes", "warmUp", "duration", "iterations"),
    *("useCudaGraph", "useSpinWait", "noDataTransfers", "help"),
}
SIZES = {  # bytes of a value
    **{"FLOAT": 4, "HALF": 2, "BF16": 2, "BOOL": 1},
    **{"INT64": 8, "INT32": 4, "INT8": 1, "UINT8": 1},
}
TO_DEVICE, RELAXED = 1, 2  # cudaMemcpyHostToDevice, cudaStreamCaptureModeRelaxed
NOT_CAPTURED = "operation not permitted under CUDA graph capture"  # trtexec's words


class Refused(Exception):
    """What ends this process with exit code 1."""


class Cuda:
    """The calls of the CUDA runtime that timing takes.

    Raises:
        Refused: there is no such library, or a call fails.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = cudart() if library is None else library
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            said = self._library.cudaGetErrorString(code) or b""
            raise Refused(f"Cuda failure: {name}: {said.decode(errors='replace')}")

    def made(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """What a call makes: it gets the address of a pointer first."""
        held = ctypes.c_void_p()
        self.call(name, ctypes.byref(held), *arguments)
        return held

    def memory(self, size: int, content: bytes | None) -> int:
        """Memory there, filled with a content or with zeros; its address."""
        held = self.made("cudaMalloc", ctypes.c_size_t(max(size, 1)))
        if content is None:
            self.call("cudaMemset", held, 0, ctypes.c_size_t(size))
        else:
            self.call("cudaMemcpy", held, content, ctypes.c_size_t(size), TO_DEVICE)
        return held.value or 0


def cudart() -> Any:
    """The CUDA runtime library: the system's, or one that pip installed."""
    names = ["libcudart.so", *(f"libcudart.so.{major}" for major in ("13", "12", "11.0"))]
    for folder in sys.path:
        names += glob.glob(os.path.join(folder, "nvidia", "*", "lib", "libcudart.so*"))
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Refused("Cuda failure: no libcudart.so. Run there: pip install nvidia-cuda-runtime")


def main(words: list[str]) -> int:
    """Do what the flags say; the exit code."""
    given = {name[2:]: value for name, _, value in (word.partition("=") for word in words)}
    try:
        trt = importlib.import_module("tensorrt")
        number = "".join(f"{int(part):02d}" for part in trt.__version__.split(".")[:3])
        banner = f"TensorRT.trtexec [TensorRT v{int(number)}] # {' '.join(words)}"
        print(f"&&&& RUNNING {banner}", flush=True)
        unknown = sorted(set(given) - FLAGS)
        if unknown:
            raise Refused(f"Unknown option: --{unknown[0]}")
        if "onnx" in given:
            build(trt, given)
        if "loadEngine" in given:
            measure(trt, given, Cuda())
    except Exception as error:  # errors of the package share no base
        say("E", f"{error}" or type(error).__name__)
        return 1
    print(f"&&&& PASSED {banner}", flush=True)
    return 0


def say(severity: str, text: str) -> None:
    """One line, as trtexec writes them."""
    print(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [{severity}] {text}", flush=True)


def logger(trt: Any) -> Any:
    """A log that says errors and warnings."""
    marks = {
        trt.ILogger.INTERNAL_ERROR: "E",
        trt.ILogger.ERROR: "E",
        trt.ILogger.WARNING: "W",
    }

    class Log(trt.ILogger):  # type: ignore[misc]  # the package has no types
        def log(self, severity: Any, message: str) -> None:
            if severity in marks:
                say(marks[severity], f"[TRT] {message}")

    return Log()


def build(trt: Any, given: dict[str, str]) -> None:
    """An engine of an ONNX file, and what its layers are."""
    log = logger(trt)
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(given["onnx"]):
        for error in (parser.get_error(i) for i in range(parser.num_errors)):
            named = f"{error.node_operator()} {error.node_name()}".strip()
            say("E", f"[TRT] Invalid Node - {named}: {error.desc()}")
        raise Refused("Failed to parse onnx file")
    config = builder.create_builder_config()
    if given.get("sparsity") == "enable":
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if given.get("profilingVerbosity") == "detailed":
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if "minShapes" in given:
        profile = builder.create_optimization_profile()
        ends = [shapes(given[f"{end}Shapes"]) for end in ("min", "opt", "max")]
        for name in ends[0]:
            profile.set_shape(name, *(end[name] for end in ends))
        config.add_optimization_profile(profile)
    kept = Path(given["timingCacheFile"]) if "timingCacheFile" in given else None
    if kept is not None:
        content = kept.read_bytes() if kept.exists() else b""
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused("Engine could not be created from network")
    if kept is not None:
        kept.write_bytes(bytes(config.get_timing_cache().serialize()))
    try:
        Path(given["saveEngine"]).write_bytes(bytes(plan))
    except OSError as error:
        raise Refused(f"Saving engine to file failed: {error}") from error
    engine = trt.Runtime(log).deserialize_cuda_engine(bytes(plan))
    if engine is None:
        raise Refused("Engine deserialization failed")
    layers = engine.create_engine_inspector().get_engine_information(
        trt.LayerInformationFormat.JSON
    )
    Path(given["exportLayerInfo"]).write_text(layers)


def measure(trt: Any, given: dict[str, str], cuda: Cuda) -> None:
    """GPU milliseconds of consecutive inferences by CUDA graph, after a warm-up; no transfers."""
    plan = Path(given["loadEngine"]).read_bytes()
    engine = trt.Runtime(logger(trt)).deserialize_cuda_engine(plan)
    if engine is None:
        raise Refused("Engine deserialization failed")
    context = engine.create_execution_context()
    wanted, files = shapes(given.get("shapes", "")), contents(given.get("loadInputs", ""))
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for name in names:
        if name in wanted and not context.set_input_shape(name, wanted[name]):
            raise Refused(f"The engine does not take {name} of {wanted[name]}")
    for name in names:
        kind = str(engine.get_tensor_dtype(name)).rpartition(".")[2]
        count = math.prod(context.get_tensor_shape(name))
        if kind not in SIZES or count < 0:
            raise Refused(f"{name} has values of {kind} or sizes that depend on values")
        content = files.get(name)
        if content is None and kind == "FLOAT":
            content = array.array("f", _noise(count)).tobytes()
        address = cuda.memory(count * SIZES[kind], content)
        if not context.set_tensor_address(name, address):
            raise Refused(f"The engine does not take memory for {name}")
    stream = cuda.made("cudaStreamCreate")
    launch = captured(context, cuda, stream)
    events = cuda.made("cudaEventCreate"), cuda.made("cudaEventCreate")
    ready = time.monotonic() + float(given.get("warmUp", 200)) / 1e3
    while time.monotonic() < ready:
        one(launch, cuda, stream, events)
    runs = [one(launch, cuda, stream, events) for _ in range(int(given.get("iterations", 10)))]
    Path(given["exportTimes"]).write_text(json.dumps([{"computeMs": ms} for ms in runs]))


def captured(context: Any, cuda: Cuda, stream: ctypes.c_void_p) -> Any:
    """A function that starts an inference: a CUDA graph of one, where it can be captured."""

    def enqueue() -> None:
        if not context.execute_async_v3(stream.value):
            raise Refused("The engine does not run")

    enqueue()  # what is made in the first run cannot be captured
    cuda.call("cudaStreamSynchronize", stream)
    graph = ctypes.c_void_p()
    cuda.call("cudaStreamBeginCapture", stream, RELAXED)
    started = context.execute_async_v3(stream.value)
    try:
        cuda.call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        if not started:
            raise Refused("the engine does not run so")
        ready = cuda.made("cudaGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
    except Refused as error:
        say("W", f"{NOT_CAPTURED}: {error}")
        return enqueue
    return lambda: cuda.call("cudaGraphLaunch", ready, stream)


def one(launch: Any, cuda: Cuda, stream: ctypes.c_void_p, events: tuple[Any, Any]) -> float:
    """Milliseconds of one inference on the GPU."""
    start, end = events
    cuda.call("cudaEventRecord", start, stream)
    launch()
    cuda.call("cudaEventRecord", end, stream)
    cuda.call("cudaEventSynchronize", end)
    found = ctypes.c_float()
    cuda.call("cudaEventElapsedTime", ctypes.byref(found), start, end)
    return found.value


def shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Sizes by input, from `a:1x3,b:1x4`."""
    pairs = (word.rpartition(":") for word in text.split(",") if word)
    return {name: tuple(int(n) for n in sizes.split("x")) for name, _, sizes in pairs}


def contents(text: str) -> dict[str, bytes]:
    """Values by input, from `a:file,b:file`."""
    pairs = (word.partition(":") for word in text.split(",") if word)
    return {name: Path(path).read_bytes() for name, _, path in pairs}


def _noise(count: int) -> list[float]:
    made = random.Random(0)
    return [made.uniform(-1.0, 1.0) for _ in range(count)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
