"""A `tensorrt` without a GPU, and a CUDA runtime that keeps no time: a run takes a millisecond for
each ten kilobytes of its engine, which is the ONNX file again.

Names and orders of arguments are those of TensorRT's Python reference and of the CUDA runtime's.
`over_rtx` builds with the real parser and builder of TensorRT-RTX instead, and runs nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

FAKE = """
import ctypes
import json
import os
from pathlib import Path

__version__ = "{version}"
TROUBLE = "{trouble}"
FOLDER = Path(__file__).parent
state = {{"ms": 0.0, "captured": None, "capturing": False, "memory": {{}}, "next": 1}}


class Names:
    def __init__(self, kind, names):
        for value, name in enumerate(names):
            setattr(self, name, Name(kind, name, value))


class Name:
    def __init__(self, kind, name, value):
        self.kind, self.name, self.value = kind, name, value

    def __int__(self):
        return self.value

    def __str__(self):
        return self.kind + "." + self.name


NetworkDefinitionCreationFlag = Names("NetworkDefinitionCreationFlag", {typing})
BuilderFlag = Names("BuilderFlag", ["SPARSE_WEIGHTS"])
ProfilingVerbosity = Names("ProfilingVerbosity", ["DETAILED"])
LayerInformationFormat = Names("LayerInformationFormat", ["JSON"])


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class Builder:
    def __init__(self, log):
        if TROUBLE == "no gpu":
            log.log(ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.log = log

    def create_network(self, flags):
        return {{"flags": flags}}

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        made = {{"flags": network["flags"], "sparse": [str(f) for f in config.flags]}}
        made["profiles"] = [p.shapes for p in config.profiles]
        (FOLDER / "built").write_text(json.dumps(made))
        config.cache.content += b"kernel "
        return network["model"]


class Config:
    def __init__(self):
        self.flags, self.profiles, self.cache, self.profiling_verbosity = [], [], Cache(b""), None

    def set_flag(self, flag):
        self.flags.append(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)

    def create_timing_cache(self, content):
        return Cache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class Cache:
    def __init__(self, content):
        self.content = content

    def serialize(self):
        return self.content


class Profile:
    def __init__(self):
        self.shapes = {{}}

    def set_shape(self, name, least, best, most):
        self.shapes[name] = [list(least), list(best), list(most)]


class ParserError:
    def node_operator(self):
        return "Tile"

    def node_name(self):
        return "/Tile"

    def desc(self):
        return "/OneHot cannot compute a shape tensor"


class OnnxParser:
    num_errors = 1

    def __init__(self, network, log):
        self.network = network

    def parse_from_file(self, path):
        self.network["model"] = Path(path).read_bytes()
        return TROUBLE != "refused"

    def get_error(self, index):
        return ParserError()


class Runtime:
    def __init__(self, log):
        pass

    def deserialize_cuda_engine(self, plan):
        return Engine(plan)


class Engine:
    def __init__(self, plan):
        import onnx

        graph = onnx.load_from_string(plan).graph
        self.plan, self.values = plan, [*graph.input, *graph.output]
        self.num_io_tensors = len(self.values)

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, format):
        return json.dumps({{"Layers": [], "Bindings": []}})

    def create_execution_context(self):
        return Context(self)

    def get_tensor_name(self, index):
        return self.values[index].name

    def get_tensor_dtype(self, name):
        return Name("DataType", "FLOAT", 0)


class Context:
    def __init__(self, engine):
        self.engine, self.set, self.addresses = engine, {{}}, {{}}

    def set_input_shape(self, name, shape):
        self.set["batch"] = shape[0]
        return True

    def get_tensor_shape(self, name):
        value = next(v for v in self.engine.values if v.name == name)
        dims = value.type.tensor_type.shape.dim
        return [self.set["batch"] if d.dim_param else d.dim_value for d in dims]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address in state["memory"]

    def execute_async_v3(self, stream):
        assert stream
        sizes = {{n: state["memory"][a] for n, a in self.addresses.items()}}
        (FOLDER / "memory").write_text(json.dumps(sizes))
        if state["capturing"] and TROUBLE == "not captured":
            return False
        state["ms"] = len(self.engine.plan) / 1e4
        return True


class Cudart:
    class Text:
        restype = None

        def __call__(self, code):
            return b"operation failed"

    cudaGetErrorString = Text()

    def _new(self, held):
        held._obj.value, state["next"] = state["next"], state["next"] + 1
        return 0

    def cudaMalloc(self, held, size):
        state["memory"][state["next"]] = size.value
        return self._new(held)

    def cudaMemset(self, held, value, size):
        assert state["memory"][held.value] == size.value
        return 0

    def cudaMemcpy(self, held, content, size, kind):
        assert state["memory"][held.value] == size.value == len(content) and kind == 1
        return 0

    cudaStreamCreate = cudaEventCreate = _new

    def cudaStreamSynchronize(self, stream):
        return 0

    def cudaStreamBeginCapture(self, stream, mode):
        state["capturing"] = True
        return 0

    def cudaStreamEndCapture(self, stream, held):
        state["capturing"] = False
        return self._new(held)

    def cudaGraphInstantiateWithFlags(self, held, graph, flags):
        assert graph.value and flags.value == 0
        state["captured"] = True
        return self._new(held)

    def cudaGraphLaunch(self, ready, stream):
        assert state["captured"]
        return 0

    def cudaEventRecord(self, event, stream):
        return 0

    def cudaEventSynchronize(self, event):
        return 0

    def cudaEventElapsedTime(self, held, start, end):
        held._obj.value = state["ms"]
        return 0


ctypes.CDLL = lambda name: Cudart()
"""
OVER_RTX = '''
from tensorrt_rtx import *
import tensorrt_rtx

__version__ = "10.13.0"


class Builder(tensorrt_rtx.Builder):
    def create_builder_config(self):
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(ComputeCapability.SM80, 0)
        return config


class Runtime:
    """Without a driver nothing is read back."""

    def __init__(self, log):
        pass

    def deserialize_cuda_engine(self, plan):
        return self

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, format):
        return "{\\"Layers\\": []}"
'''
TYPING = {"10": ["EXPLICIT_BATCH", "STRONGLY_TYPED"], "11": ["EXPLICIT_BATCH"]}


def install(folder: Path, *, version: str = "10.13.3.9", trouble: str = "") -> Path:
    """Write the package to a folder for PYTHONPATH; `built` and `memory` in it say what it did."""
    typing = TYPING[version.partition(".")[0]]
    return _written(folder, FAKE.format(version=version, typing=typing, trouble=trouble))


def over_rtx(folder: Path) -> Path:
    """The package as TensorRT-RTX, for the A100."""
    return _written(folder, OVER_RTX)


def python_beside(folder: Path) -> str:
    """A Python to name with --host-python: it finds that package, and keeps its files there."""
    python = folder / "python3"
    setting = f'PYTHONPATH="{folder}" TMPDIR="{folder}"'
    python.write_text(f'#!/bin/sh\n{setting} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def _written(folder: Path, text: str) -> Path:
    package = folder / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    return package
