"""What a level does to the weights of a site: slice, refit, round. Computed once, kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zipc.core.types import Allocation, Level, Site
from zipc.numerics.int8 import (
    STATIC,
    ActivationRange,
    QuantizedWeight,
    calibrate,
    fake_quantize_dynamic,
    fake_quantize_static,
    quantize_weight,
)
from zipc.pruner.compensate import COMPENSATORS
from zipc.pruner.compensate.least_squares import center
from zipc.pruner.evidence import InputStats
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.graph.surgery import columns, cut
from zipc.pruner.obs import Sweep
from zipc.pruner.products import linear


@dataclass(frozen=True, slots=True)
class LinearState:
    """One linear map at a level: float weights, or integer weights with an activation rule."""

    weight: Tensor  # (out, in) fp32; what the integer weights stand for, where there are such
    bias: Tensor | None
    numeric: str = "fp32"
    integer: QuantizedWeight | None = None
    activation: ActivationRange | None = None

    def seen(self, x: Tensor) -> Tensor:
        """The input as the product sees it: rounded where the numeric rounds."""
        if self.activation is not None:
            return fake_quantize_static(x, self.activation)
        return fake_quantize_dynamic(x) if self.integer is not None else x

    def __call__(self, x: Tensor) -> Tensor:
        return linear(self.seen(x), self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class SiteState:
    """All tensors of a site at a level."""

    linears: Mapping[str, LinearState] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)  # consumer -> bias when removed
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # sliced tensors of other modules

    @property
    def nbytes(self) -> int:
        held = [s.weight for s in self.linears.values()] + list(self.tensors.values())
        return sum(t.numel() * t.element_size() for t in held)


CACHE_BYTES = 3 << 26  # levels kept in memory: at least this, and
CACHE_MODELS = 4  # this many times the dense weights of all sites, so that a search never thrashes


def variant_of(allocation: Allocation, states: Mapping[str, SiteState]) -> Variant:
    """What the executor needs to run the model with these weights."""
    linears: dict[str, Callable[[Tensor], Tensor]] = {}
    constants: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for state in states.values():
        linears.update(state.linears)
        constants.update(state.constants)
        tensors.update(state.tensors)
    widths = {n: lv.width for n, lv in allocation.levels.items()}
    return Variant(linears=linears, constants=constants, widths=widths, tensors=tensors)


class Levels:
    """Weights of every (site, level), made on demand from orders and Gram matrices."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        weights: Mapping[str, Tensor],
        stats: Mapping[str, InputStats],
        sweeps: Mapping[str, Sweep],
        *,
        weight_limit: int = 127,
        compensator: str = "least_squares",
    ) -> None:
        self.sites = sites
        self.weights = weights
        self.stats = stats
        self.sweeps = sweeps
        self._limit = weight_limit
        self._compensate = COMPENSATORS[compensator]
        self._cache: OrderedDict[tuple[str, Level, bool], SiteState] = OrderedDict()
        self._cache_bytes = max(CACHE_BYTES, CACHE_MODELS * self._dense_bytes())
        self._held = 0

    def _dense_bytes(self) -> int:
        names = {s.parameter for site in self.sites.values() for s in site.slices}
        return sum(self.weights[n].numel() * self.weights[n].element_size() for n in names)

    def kept(self, site: str, width: int) -> tuple[int, ...]:
        """Units kept, ascending."""
        order = self.sweeps[site].order
        return tuple(sorted(order[len(order) - width :]))

    def state(self, site: str, level: Level, *, feedback: bool = False) -> SiteState:
        """Weights at a level; `feedback` rounds with error feedback, which is slower."""
        key = (site, level, feedback)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        made = self._make(self.sites[site], level, feedback)
        self._cache[key] = made
        self._held += made.nbytes
        while self._held > self._cache_bytes and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._held -= old.nbytes
        return made

    def forget(self) -> None:
        """Drop the weights held in memory; they are made again when asked for."""
        self._cache.clear()
        self._held = 0

    def states(self, allocation: Allocation, *, feedback: bool = False) -> dict[str, SiteState]:
        """The weights of every site under an allocation."""
        return {n: self.state(n, lv, feedback=feedback) for n, lv in allocation.levels.items()}

    def variant(self, allocation: Allocation, *, feedback: bool = False) -> Variant:
        """The whole model under an allocation."""
        return variant_of(allocation, self.states(allocation, feedback=feedback))

    def _make(self, site: Site, level: Level, feedback: bool) -> SiteState:
        kept = self.kept(site.name, level.width)
        consumers = {c.module: c for c in site.consumers}
        if level.removed:
            constants = {}
            for module in consumers:
                empty = torch.zeros(0, dtype=torch.long)
                constants[module] = self._repaired(module, empty)[1]
            return SiteState(constants=constants)
        linears: dict[str, LinearState] = {}
        tensors: dict[str, Tensor] = {}
        for module in site.producers:
            weight = cut(self.weights[module + ".weight"], site, module + ".weight", kept)
            bias = self.weights.get(module + ".bias")
            if bias is not None:
                bias = cut(bias, site, module + ".bias", kept)
            linears[module] = self._rounded(module, weight, bias, level.numeric, None, feedback)
        for module, c in consumers.items():
            keep = columns(c.outer, site.units, c.inner, kept)
            if level.width == site.units:
                weight, bias = self.weights[module + ".weight"], self.weights.get(module + ".bias")
            else:
                weight, bias = self._repaired(module, keep)
            linears[module] = self._rounded(module, weight, bias, level.numeric, keep, feedback)
        for piece in site.slices:
            owner = piece.parameter.rpartition(".")[0]
            if owner not in linears:
                value = self.weights[piece.parameter]
                tensors[piece.parameter] = cut(value, site, piece.parameter, kept)
        return SiteState(linears, {}, tensors)

    def _repaired(self, module: str, keep: Tensor) -> tuple[Tensor, Tensor]:
        held = self.stats[module]
        gram, mean = center(held.gram, held.total, held.count)
        weight, bias = self._compensate(
            self.weights[module + ".weight"],
            self.weights.get(module + ".bias"),
            gram,
            mean,
            keep=keep,
        )
        assert bias is not None
        return weight, bias

    def _rounded(
        self,
        module: str,
        weight: Tensor,
        bias: Tensor | None,
        numeric: str,
        keep: Tensor | None,
        feedback: bool,
    ) -> LinearState:
        held = self.stats[module]
        gram, sample = held.gram, held.sample
        if keep is not None and numeric != "fp32":
            gram, sample = gram[keep][:, keep], sample[:, keep]
        return self.rounded(weight, bias, numeric, gram=gram if feedback else None, sample=sample)

    def rounded(
        self,
        weight: Tensor,
        bias: Tensor | None,
        numeric: str,
        *,
        gram: Tensor | None,
        sample: Tensor,
    ) -> LinearState:
        """A linear map in a numeric; rounding errors are fed back where `gram` (in, in) is given.

        `sample` (rows, in) calibrates a static activation range.
        """
        if numeric == "fp32":
            return LinearState(weight, bias)
        integer = quantize_weight(weight, gram=gram, limit=self._limit)
        activation = calibrate(sample, weight) if numeric == STATIC else None
        return LinearState(integer.dequantized(), bias, numeric, integer, activation)
