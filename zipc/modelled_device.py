"""A device that is not here: its times are those of a roofline model, exact and repeatable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zipc.core.types import Allocation, Difference, PairedTiming, SpecSheet, TableKind, Workload
from zipc.exporters.kernels import kernels_of
from zipc.latency_tables.modelled import DeviceModel, Doubt, device_model
from zipc.latency_tables.roofline import milliseconds
from zipc.profiler.device import TimedGraph


@dataclass(slots=True)
class ModelledGraph:
    """A graph whose every run takes what the model says; a `TimedGraph`."""

    ms: float
    session_options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> float:
        return self.ms


@dataclass(frozen=True, slots=True)
class ModelledDevice:
    """A GPU under TensorRT as its data sheet and published latencies describe it; a `Device`."""

    target: str
    sheet: SpecSheet
    model: DeviceModel

    @classmethod
    def of(cls, target: str, sheet: SpecSheet) -> ModelledDevice:
        """The device of a target, with the model of its family."""
        return cls(target, sheet, device_model(sheet.anchors))

    @property
    def runtime(self) -> str:
        return "tensorrt"

    @property
    def kind(self) -> TableKind:
        return "modelled"

    @property
    def notes(self) -> Sequence[str]:
        return ()

    def fingerprint(self) -> dict[str, Any]:
        sheet = {k: v for k, v in dataclasses.asdict(self.sheet).items() if k != "source"}
        return sheet | {"model": dataclasses.asdict(self.model.fractions)}

    def state(self) -> dict[str, Any]:
        return {}

    def timer(self) -> ModelledDevice:
        return self

    def load(self, model: bytes, *, workload: Workload) -> ModelledGraph:
        """Price a graph.

        Raises:
            UnsupportedModel: the shape of some value does not follow from the workload.
        """
        operators = kernels_of(model, workload)
        return ModelledGraph(milliseconds(operators, self.sheet, self.model.fractions))

    def doubt(self, dense: bytes, workload: Workload) -> Doubt:
        base = self.target.partition(":")[0]
        return self.model.doubt(base, kernels_of(dense, workload))


def predicted_timing(
    reference: TimedGraph, compiled: TimedGraph, allocation: Allocation, doubt: Doubt
) -> PairedTiming:
    """The speedup of an allocation by the model, with the interval of its error on ratios.

    There are no samples: nothing was measured.
    """
    speedup = reference.run() / compiled.run()
    reach = math.exp(doubt.reach(differences(allocation)))
    interval = speedup / reach, speedup * reach
    return PairedTiming((), (), speedup, interval, notes=(doubt.note,))


def differences(allocation: Allocation) -> Iterable[Difference]:
    """In what an allocation differs from the dense model; widths, always."""
    return {"width", *(kind for level in allocation.levels.values() for kind in level.differs)}
