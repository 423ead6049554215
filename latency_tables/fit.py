"""Fit the fractions of a device to published latencies, and tell how far they can be trusted.

Latencies of one network differ between sources by more than a model's own error: other clocks,
other runtimes. The error that counts is therefore that on whole sources left out of the fit, and
for a speedup it is the error of ratios within such a source.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from zipc.core.errors import CorruptFile
from zipc.core.types import Difference, Pattern, SpecSheet
from zipc.latency_tables.networks import Setting, Style, kernels
from zipc.latency_tables.operators import Precision
from zipc.latency_tables.roofline import Array, Fractions, Kernels

FOLDER = Path(__file__).parent / "anchors"
START = Fractions(
    launch_us=4.0,
    fp16=0.7,
    int8=0.6,
    bandwidth=0.75,
    cache=3.0,
    tile=16.0,
    attention=0.3,
    sparse=1.4,
)
LEAST = Fractions(0.5, 0.2, 0.15, 0.3, 1.0, 2.0, 0.03, 1.0)
MOST = Fractions(15.0, 1.0, 1.0, 1.0, 8.0, 100.0, 1.0, 2.0)
PULL = 0.15  # weight of staying near START: what no source tells stays there

Ms = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Figure = tuple[str, int, int, Precision, Pattern, Ms]  # network, batch, size, ..., milliseconds


class Source(BaseModel):
    """A document with latencies of one device under one runtime."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    target: str
    tag: Literal["P", "C"]
    style: Style
    title: str
    url: str
    figures: tuple[Figure, ...] = Field(min_length=1)


def read_sources(family: str) -> tuple[Source, ...]:
    """The published latencies of a family of devices.

    Raises:
        CorruptFile: the file does not hold such.
    """
    path = FOLDER / f"{family}.toml"
    try:
        entries = tomllib.loads(path.read_text())["source"]
        return tuple(Source.model_validate(entry) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path} does not hold published latencies: {error}") from error


class Laid:
    """A source with its networks laid out on its device."""

    def __init__(self, source: Source, sheet: SpecSheet) -> None:
        self.source = source
        self.ms = np.array([figure[-1] for figure in source.figures])
        networks = [
            kernels(network, Setting(batch, size, precision, pattern, source.style))
            for network, batch, size, precision, pattern, _ in source.figures
        ]
        self.begin = np.cumsum([0, *map(len, networks[:-1])])
        self.kernels = Kernels([k for network in networks for k in network], sheet)
        self.sparse = np.array([figure[4] != "dense" for figure in source.figures])
        place = {figure[:-1]: i for i, figure in enumerate(source.figures)}
        self.beside = [place.get((*f[:4], "dense"), i) for i, f in enumerate(source.figures)]

    def log_errors(self, fractions: Fractions) -> Array:
        """log(predicted / published) of every figure."""
        found = np.add.reduceat(self.kernels.milliseconds(fractions), self.begin)
        errors: Array = np.log(found / self.ms)
        return errors

    def residuals(self, fractions: Fractions) -> Array:
        """The same, but of a 2:4 figure the error of what it gains on the dense one beside it.

        That is what a sparse figure tells; its latency is off by as much as the dense one.
        """
        errors = self.log_errors(fractions)
        dense = np.where(np.arange(len(errors)) == self.beside, 0.0, errors[self.beside])
        return errors - dense


def lay_out(sources: Sequence[Source], sheets: Mapping[str, SpecSheet]) -> list[Laid]:
    """Sources with the data sheets of their targets."""
    return [Laid(source, sheets[source.target]) for source in sources]


class Measured(Protocol):
    """Latencies to fit to."""

    def residuals(self, fractions: Fractions) -> Array: ...


def fit(laid: Sequence[Measured]) -> Fractions:
    """The fractions of least robust squared log-error; every source counts alike."""
    from scipy.optimize import least_squares  # half a second that no other verb should pay

    start, least, most = (np.log(astuple(f)) for f in (START, LEAST, MOST))

    def residuals(logs: Array) -> Array:
        fractions = Fractions(*np.exp(logs).tolist())
        scaled = [e / math.sqrt(len(e)) for e in (s.residuals(fractions) for s in laid)]
        return np.concatenate([*scaled, PULL * (logs - start) / math.sqrt(len(logs))])

    found = least_squares(
        residuals,
        start,
        bounds=(least, most),
        loss="soft_l1",
        f_scale=0.2,
        diff_step=[1e-3] * len(start),
    )
    return Fractions(*(float(f"{value:.4g}") for value in np.exp(found.x)))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a fit to the other sources says of one: relative errors of its dense figures, and
    log-errors of ratios of all."""

    source: str
    figures: int
    median_error: float
    worst_error: float
    ratios: Mapping[Difference, tuple[float, ...]]


def hold_out(laid: Sequence[Laid]) -> tuple[HeldOut, ...]:
    """Predict every source from a fit to all others."""
    found = []
    for index, left in enumerate(laid):
        rest = [*laid[:index], *laid[index + 1 :]]
        errors = left.log_errors(fit(rest))
        relative = np.abs(np.exp(errors[~left.sparse]) - 1)
        found.append(
            HeldOut(
                left.source.name,
                len(relative),
                float(np.median(relative)),
                float(relative.max()),
                ratio_errors(left.source.figures, errors),
            )
        )
    return tuple(found)


def ratio_errors(figures: Sequence[Figure], errors: Array) -> dict[Difference, tuple[float, ...]]:
    """Log-errors of the ratios that a speedup is, by what the two figures differ in.

    "width" compares networks at equal batch, size, precision and pattern.
    """
    found: dict[Difference, list[float]] = {"width": [], "int8": [], "2:4": []}
    for (a, at), (b, bt) in combinations(zip(figures, errors, strict=True), 2):
        (network, *sizes, precision, pattern, _), (other, *others, precise, patterned, _) = a, b
        if sizes != others:
            continue
        same = (network == other, precision == precise, pattern == patterned)
        kind = DIFFERENCES.get(same)
        if kind is not None:
            found[kind].append(float(at - bt))
    return {kind: tuple(values) for kind, values in found.items()}


DIFFERENCES: dict[tuple[bool, bool, bool], Difference] = {
    (False, True, True): "width",
    (True, False, True): "int8",
    (True, True, False): "2:4",
}


def half_widths(held: Sequence[HeldOut]) -> dict[Difference, float]:
    """Half of the 95 % interval of a log-ratio, by kind: 1.96 root mean squares, all sources.

    A kind without ratios has the widest of the others.
    """
    widths: dict[Difference, float] = {}
    for kind in ("width", "int8", "2:4"):
        values = [v for h in held for v in h.ratios[kind]]
        if values:
            widths[kind] = 1.96 * math.sqrt(sum(v * v for v in values) / len(values))
    return {kind: widths.get(kind, max(widths.values())) for kind in ("width", "int8", "2:4")}
