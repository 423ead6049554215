"""torch: one inference, timed, operator by operator as modules of torch run, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from zipc.core.types import Workload
from zipc.profiler.runners.session import SessionRunner

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from zipc.profiler.runners.torch_graph import TorchGraph


class TorchRunner(SessionRunner):
    """Times one graph in torch on the CPU, without torch's compiler."""

    runtime = "torch"
    place: ClassVar[Mapping[str, Any]] = {}

    @staticmethod
    def version() -> str:
        import torch

        return str(torch.__version__)

    @staticmethod
    def options(workload: Workload) -> dict[str, Any]:
        return {"device": "cpu", "threads": workload.threads}

    @staticmethod
    def open(model: str | bytes, options: Mapping[str, Any]) -> TorchGraph:
        from zipc.profiler.runners.torch_graph import TorchGraph

        return TorchGraph(model, **options)


class TorchCudaRunner(TorchRunner):
    """Times one graph in torch on this machine's GPU, as a CUDA graph: compute only, no transfers.

    Products of fp32 run in TF32, as torch is told to where speed matters.
    """

    runtime = "torch-cuda"

    @staticmethod
    def options(workload: Workload) -> dict[str, Any]:
        return {"device": "cuda", "threads": 0}
