"""OpenVINO on the CPU: one inference, timed, in the precision that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zipc.core.types import Difference, Workload
from zipc.profiler.agent import PRECISION, OpenVinoSession
from zipc.profiler.runners.session import SessionRunner

PRODUCTS = ("FullyConnected", "MatMul", "Convolution")  # layers of a compiled model
_TYPES: Mapping[str, str] = {  # as ONNX Runtime spells them
    "f32": "tensor(float)",
    "f64": "tensor(double)",
    "f16": "tensor(float16)",
    "i64": "tensor(int64)",
    "i32": "tensor(int32)",
    "i8": "tensor(int8)",
    "u8": "tensor(uint8)",
    "boolean": "tensor(bool)",
}


class OpenVinoRunner(SessionRunner):
    """Times one graph in OpenVINO, its axes as open as in the file.

    Floats stay fp32 but for products that the graph has in bf16: left alone, OpenVINO computes all
    of them in bf16 where the processor can, which would be another network. Threads are not tied to
    cores, as those of ONNX Runtime are not.
    """

    runtime = "openvino"
    place: ClassVar[Mapping[str, Any]] = {"device": "CPU"}

    @staticmethod
    def version() -> str:
        import openvino

        return str(openvino.__version__).partition("-")[0]  # a build number follows

    @staticmethod
    def options(workload: Workload) -> dict[str, Any]:
        options: dict[str, Any] = {PRECISION: "f32"}
        if workload.threads:
            options |= {
                "INFERENCE_NUM_THREADS": workload.threads,
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,
            }
        return options

    @staticmethod
    def open(model: str | bytes, options: Mapping[str, Any]) -> OpenVinoGraph:
        return OpenVinoGraph(model, options)


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of a graph."""

    name: str
    type: str
    shape: tuple[int | None, ...]


class OpenVinoGraph(OpenVinoSession):
    """A compiled graph that also gives its outputs, to several threads at once."""

    def get_inputs(self) -> list[Value]:
        return [_value(*pair) for pair in zip(self.inputs, self.compiled.inputs, strict=True)]

    def get_outputs(self) -> list[Value]:
        return [_value(n, port) for port in self.compiled.outputs for n in sorted(port.names)]

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> Any:
        """Do one inference; its outputs by `names`, or nothing for None."""
        if names is None:
            return super().run(None, feeds)
        taken = [feeds[name] for name in self.inputs]
        found = self.compiled.create_infer_request().infer(taken)
        return [np.array(found[name]) for name in names]


def narrow_products(model: bytes | Path) -> dict[Difference, int]:
    """How many products of a graph OpenVINO runs on integers and in bf16, as its compiled model
    tells.

    Raises:
        ExportMismatch: OpenVINO cannot load the graph.
    """
    source = str(model) if isinstance(model, Path) else model
    try:
        graph = OpenVinoGraph(source, OpenVinoRunner.options(Workload()))
    except RuntimeError as error:
        name = source if isinstance(source, str) else "the graph"
        raise OpenVinoRunner.cannot_load(name, error) from error
    layers = [node.get_rt_info() for node in graph.compiled.get_runtime_model().get_ordered_ops()]
    kinds = Counter(
        layer["runtimePrecision"].astype(str)
        for layer in layers
        if layer["layerType"].astype(str) in PRODUCTS
    )
    return {"int8": kinds["u8"] + kinds["i8"], "bf16": kinds["bf16"]}


def _value(name: str, port: Any) -> Value:
    shape = tuple(d.get_length() if d.is_static else None for d in port.get_partial_shape())
    kind = port.get_element_type().get_type_name()
    return Value(name, _TYPES.get(kind, kind), shape)
