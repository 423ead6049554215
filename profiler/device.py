"""Where graphs are timed: everything that measures asks a `Device` for its runners."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from zipc.core.errors import UsageError
from zipc.core.types import Runner, TableKind, Workload
from zipc.latency_tables.modelled import Doubt
from zipc.profiler.fingerprint import device_fingerprint, device_state
from zipc.profiler.runners.apart import TimingProcess


class TimedGraph(Runner, Protocol):
    """A graph that is ready to run, and what its session was opened with."""

    session_options: dict[str, Any]


class GraphTimer(Protocol):
    """Holds graphs that are timed in turns."""

    def load(self, model: bytes, *, workload: Workload) -> TimedGraph:
        """Make a graph ready to run.

        Raises:
            ExportMismatch: the runtime cannot load it.
            UsageError: the workload does not say how large an input is.
        """
        ...


class Device(Protocol):
    """A device that graphs are timed on."""

    @property
    def runtime(self) -> str:
        """What runs them there."""
        ...

    @property
    def kind(self) -> TableKind:
        """How its times are known."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What went wrong on it since it was opened, and was mended."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What its prices depend on."""
        ...

    def state(self) -> dict[str, Any]:
        """What changes by the minute: clocks, load, temperatures."""
        ...

    def doubt(self, dense: bytes, workload: Workload) -> Doubt | None:
        """How far speedups over a dense graph may be off; None where they are measured."""
        ...

    def timer(self) -> GraphTimer:
        """Open a new process there, with the memory a deployed model would find."""
        ...


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """This machine; a `Device`."""

    runtime: str

    @property
    def kind(self) -> TableKind:
        return "measured"

    @property
    def notes(self) -> Sequence[str]:
        return ()

    def fingerprint(self) -> dict[str, Any]:
        return device_fingerprint(runtime=self.runtime)

    def state(self) -> dict[str, Any]:
        return device_state()

    def doubt(self, dense: bytes, workload: Workload) -> None:
        return None

    def timer(self) -> TimingProcess:
        return TimingProcess(self.runtime)


def local_device(runtime: str) -> LocalDevice:
    """This machine under a runtime.

    Raises:
        UsageError: it is not installed, or its device is not here.
    """
    if runtime == "openvino" and importlib.util.find_spec(runtime) is None:
        raise UsageError(
            "OpenVINO is not installed. Run: pip install 'zipc[openvino]'; or choose --runtime "
            "onnxruntime."
        )
    if runtime == "torch-cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                "torch finds no NVIDIA GPU here. Install a driver and a build of torch for CUDA, "
                "or choose --target cpu."
            )
    return LocalDevice(runtime)
