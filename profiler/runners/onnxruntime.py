"""ONNX Runtime on the CPU: one inference, timed, under default session options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort

from zipc.core.axes import shape_of
from zipc.core.errors import UsageError
from zipc.core.types import Workload
from zipc.profiler.agent import PROVIDERS, open_session, values
from zipc.profiler.facts import one_line
from zipc.profiler.runners.session import SessionRunner

_DTYPES: Mapping[str, str] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OnnxRuntimeRunner(SessionRunner):
    """Times one graph in ONNX Runtime.

    Sessions keep ONNX Runtime's defaults except for the thread counts. With more than one thread
    the pool does not spin: an idle spinning pool steals the core from the session timed next.
    """

    runtime = "onnxruntime"
    place: ClassVar[Mapping[str, Any]] = {"providers": list(PROVIDERS)}

    @staticmethod
    def version() -> str:
        return str(ort.__version__)

    @staticmethod
    def options(workload: Workload) -> dict[str, Any]:
        options: dict[str, Any] = {
            "intra_op_num_threads": workload.threads,
            "inter_op_num_threads": 1,
        }
        if workload.threads > 1:
            options["session.intra_op.allow_spinning"] = "0"
        return options

    @staticmethod
    def open(model: str | bytes, options: Mapping[str, Any]) -> Any:
        return open_session(model, options)

    @staticmethod
    def made_up(session: Any, model: Path | bytes, workload: Workload) -> dict[str, np.ndarray]:
        return default_feeds(session, workload)


class StandInRunner(OnnxRuntimeRunner):
    """Runs graphs for TensorRT here, for their outputs and never for their times.

    The last level of optimisation of ONNX Runtime 1.32 crashes on some graphs in fp16 (a product
    between transposes, as in a decoder that reads its encoder), so it is left out.
    """

    @staticmethod
    def options(workload: Workload) -> dict[str, Any]:
        level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        return {**OnnxRuntimeRunner.options(workload), "graph_optimization_level": level}


def default_feeds(session: Any, workload: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    """Make one input per graph input, from its name, type and shape.

    The values of an input depend on its name and the seed only, so two graphs are timed on the
    same data.

    Raises:
        UsageError: an input has a type that is not a plain tensor of numbers, or the workload does
            not say how large it is; see `inputs.shape_of`.
    """
    feeds: dict[str, np.ndarray] = {}
    for node in session.get_inputs():
        if node.type not in _DTYPES:
            raise UsageError(f"Cannot make data for input {node.name!r} of type {node.type}.")
        shape = shape_of(node.name, node.shape, workload)
        feeds[node.name] = values(node.name, shape, _DTYPES[node.type], seed)
    return feeds


__all__ = ["PROVIDERS", "OnnxRuntimeRunner", "default_feeds", "one_line"]
