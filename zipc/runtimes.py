"""The runtimes that graphs are built for, checked in and judged by on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnxruntime as ort

from zipc.core.types import Difference, TableKind, Target
from zipc.exporters.openvino import OPENVINO
from zipc.exporters.specialise import ONNX_RUNTIME, Emitter, count_integer_kernels
from zipc.exporters.tensorrt.emit import IN_FLOATS, TensorRt
from zipc.exporters.tensorrt.qdq import count_rounded_products
from zipc.profiler.agent import TITLES
from zipc.profiler.runners.onnxruntime import PROVIDERS, OnnxRuntimeRunner
from zipc.profiler.runners.openvino import OpenVinoRunner, narrow_products
from zipc.profiler.runners.session import SessionRunner
from zipc.profiler.runners.torch import TorchCudaRunner, TorchRunner


@dataclass(frozen=True, slots=True)
class CpuRuntime:
    """How graphs are written for a runtime, run in it, and asked for their narrow products.

    `convolutions`: one of them between floats may run on integers too. `timed` writes what a device
    is given to time, where that is not what runs here.
    """

    emitter: Emitter
    runner: type[SessionRunner]
    narrow_products: Callable[[bytes], Mapping[Difference, int]]
    convolutions: bool = False
    timed: Emitter | None = None

    @property
    def title(self) -> str:
        return TITLES[self.runner.runtime]


def integer_kernels(model: bytes | Path) -> int:
    """Integer products in the graph as ONNX Runtime optimises it under default options.

    Raises:
        ExportMismatch: ONNX Runtime cannot load the graph.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(path)
        source = str(model) if isinstance(model, Path) else model
        try:
            ort.InferenceSession(source, options, providers=PROVIDERS)
        except Exception as error:  # ONNX Runtime's errors share no base
            name = str(model) if isinstance(model, Path) else "the graph"
            raise OnnxRuntimeRunner.cannot_load(name, error) from error
        return count_integer_kernels(onnx.load(path, load_external_data=False).graph.node)


RUNTIMES: Mapping[str, CpuRuntime] = {
    "onnxruntime": CpuRuntime(
        ONNX_RUNTIME, OnnxRuntimeRunner, lambda model: {"int8": integer_kernels(model)}
    ),
    "openvino": CpuRuntime(OPENVINO, OpenVinoRunner, narrow_products),
    "torch": CpuRuntime(ONNX_RUNTIME, TorchRunner, lambda model: {}),
    "torch-cuda": CpuRuntime(IN_FLOATS, TorchCudaRunner, lambda model: {}),
    "tensorrt": CpuRuntime(  # ONNX Runtime stands for TensorRT here
        IN_FLOATS,
        OnnxRuntimeRunner,
        lambda model: {"int8": count_rounded_products(model)},
        convolutions=True,
    ),
}


def runtime_of(target: Target, kind: TableKind) -> CpuRuntime:
    """The runtime of a target whose times are known in a way.

    On a GPU, graphs are timed as TensorRT takes them, all in fp16: before there is data, nothing is
    known to overflow.
    """
    runtime = RUNTIMES[target.runtime]
    if target.runtime == "tensorrt" and kind == "measured":
        return replace(runtime, timed=TensorRt({}))
    return runtime
