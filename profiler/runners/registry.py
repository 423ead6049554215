"""The runtimes that run graphs on this machine, by name."""

from __future__ import annotations

from collections.abc import Mapping

from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner, StandInRunner
from zipc.profiler.runners.openvino import OpenVinoRunner
from zipc.profiler.runners.session import SessionRunner
from zipc.profiler.runners.torch import TorchCudaRunner, TorchRunner

RUNNERS: Mapping[str, type[SessionRunner]] = {
    "onnxruntime": OnnxRuntimeRunner,
    "openvino": OpenVinoRunner,
    "torch": TorchRunner,
    "torch-cuda": TorchCudaRunner,
    "tensorrt": StandInRunner,
}
