"""The models of devices shipped with zipc: fractions, and how far they were off where one can tell.

`benchmarks/bench_roofline.py` makes modelled.json from the published latencies in anchors/.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from zipc.core.errors import CorruptFile, UsageError
from zipc.core.types import Difference, SpecSheet
from zipc.latency_tables.fit import HeldOut, Source, fit, half_widths, hold_out, lay_out
from zipc.latency_tables.networks import Setting, kernels
from zipc.latency_tables.operators import Attention, Operator, Product
from zipc.latency_tables.roofline import Fractions

FILE = Path(__file__).parent / "modelled.json"
ENOUGH = 2  # published figures of a kind of network that a device needs to count as anchored
UNANCHORED = 2.0  # times as wide is the interval of what is not; see bench_roofline.py
NetworkKind = Literal["attention", "other"]


class DeviceModel(BaseModel):
    """A family of devices: the roofline's fractions and their errors on held-out sources."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: Literal["modelled"] = "modelled"
    fractions: Fractions
    half_width: dict[Difference, float]  # of the 95 % interval of a log-ratio
    held_out: tuple[HeldOut, ...] = Field(min_length=2)
    anchors: dict[str, dict[NetworkKind, int]]  # published figures by target

    def anchored(self, target: str, network: NetworkKind) -> bool:
        """Whether latencies of such networks on this very device are published."""
        return self.anchors.get(target, {}).get(network, 0) >= ENOUGH

    def doubt(self, target: str, operators: Sequence[Operator]) -> Doubt:
        """How far speedups of a network on one of the devices may be off."""
        anchored = self.anchored(target, network_kind(operators))
        return Doubt(self.half_width, anchored)


@dataclass(frozen=True, slots=True)
class Doubt:
    """The error of ratios of modelled latencies; twice as wide for what is not anchored."""

    half_width: Mapping[Difference, float]  # of the 95 % interval of a log-ratio
    anchored: bool

    def reach(self, differences: Iterable[Difference]) -> float:
        """Half-width of the interval for graphs that differ in all of these."""
        squares = sum(self.half_width[kind] ** 2 for kind in set(differences))
        return math.sqrt(squares) * (1.0 if self.anchored else UNANCHORED)

    @property
    def note(self) -> str:
        """What to tell beside a predicted speedup."""
        told = "latencies by a roofline model fitted to published figures; nothing was measured"
        if self.anchored:
            return told
        return (
            f"unanchored: no such network's latency on this device is published; the interval is "
            f"{UNANCHORED:g} times as wide. {told.capitalize()}"
        )


def fitted(sources: Sequence[Source], sheets: Mapping[str, SpecSheet]) -> DeviceModel:
    """Fit a family of devices to its published latencies."""
    laid = lay_out(sources, sheets)
    held = hold_out(laid)
    anchors: dict[str, dict[NetworkKind, int]] = {}
    for source in sources:
        for network, batch, size, *_ in source.figures:
            counts = anchors.setdefault(source.target, {"attention": 0, "other": 0})
            counts[network_kind(kernels(network, Setting(batch, size)))] += 1
    return DeviceModel(
        fractions=fit(laid), half_width=half_widths(held), held_out=held, anchors=anchors
    )


def network_kind(operators: Sequence[Operator]) -> NetworkKind:
    """Whether a network is one of attention blocks, or has few or none of them."""
    attentions = sum(isinstance(o, Attention) for o in operators)
    products = sum(isinstance(o, Product) for o in operators)
    return "attention" if 0 < products <= 10 * attentions else "other"


def device_model(family: str) -> DeviceModel:
    """The model of a family of devices.

    Raises:
        UsageError: there is none.
        CorruptFile: the file of models is damaged.
    """
    try:
        models = TypeAdapter(dict[str, DeviceModel]).validate_json(FILE.read_bytes())
    except (OSError, ValidationError) as error:
        raise CorruptFile(f"{FILE} is damaged: {error}. Install zipc again.") from error
    if family not in models:
        raise UsageError(f"No model of devices '{family}'. Choose from: {', '.join(models)}.")
    return models[family]
