"""The runtimes that run graphs on a CPU, by name."""

from __future__ import annotations

from collections.abc import Mapping

from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner, StandInRunner
from zipc.profiler.runners.openvino import OpenVinoRunner
from zipc.profiler.runners.session import SessionRunner

RUNNERS: Mapping[str, type[SessionRunner]] = {
    "onnxruntime": OnnxRuntimeRunner,
    "openvino": OpenVinoRunner,
    "tensorrt": StandInRunner,
}
