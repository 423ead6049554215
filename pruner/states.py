"""Weights of an allocation: those of maps at their levels, and all others that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from zipc.core.types import Allocation, Pattern
from zipc.numerics import bf16
from zipc.numerics.bf16 import BF16
from zipc.numerics.int8 import (
    DYNAMIC,
    ActivationRange,
    QuantizedWeight,
    fake_quantize_dynamic,
    fake_quantize_static,
)
from zipc.pruner.balance import Factors
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.graph.trace import MapCall
from zipc.pruner.maps import own_layout


@dataclass(frozen=True, slots=True)
class MapState:
    """One map at a level: float weights, or integer weights with an activation rule."""

    weight: Tensor  # fp32, own layout: values of bf16 in that, what integer weights stand for
    bias: Tensor | None
    numeric: str = "fp32"
    integer: QuantizedWeight | None = None
    activation: ActivationRange | None = None
    pattern: Pattern = "dense"

    @property
    def differs(self) -> bool:
        """Whether it is more than its weights cut and fitted: thinned out or rounded."""
        return self.numeric != "fp32" or self.pattern != "dense"

    def seen(self, x: Tensor) -> Tensor:
        """The input as the product sees it: rounded where the numeric rounds."""
        if self.activation is not None:
            return fake_quantize_static(x, self.activation)
        if self.numeric == BF16:
            return bf16.converted(x)
        return fake_quantize_dynamic(x) if self.numeric == DYNAMIC else x


@dataclass(slots=True)
class States:
    """All tensors of an allocation that are not those of the dense model."""

    maps: dict[str, MapState] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)  # consumer -> bias when removed
    tensors: dict[str, Tensor] = field(default_factory=dict)  # cut tensors of other modules
    picks: Mapping[str, int] = field(default_factory=dict)  # see `Variant`
    dropped: tuple[str, ...] = ()  # paths of modules that are gone, and
    silent: tuple[str, ...] = ()  # their maps whose zeros are added to the rest


def variant_of(allocation: Allocation, states: States) -> Variant:
    """What the executor needs to run the model with these weights."""
    return Variant(states.maps, states.constants, allocation.widths, states.tensors, states.picks)


def divided(call: MapCall, state: MapState, moved: Factors) -> MapState:
    """A map whose rows are divided by what others make up for; its integers stay as they are."""
    if moved.rows is None:
        return state
    bias = None if state.bias is None else moved.outputs(state.bias)
    if state.integer is None:
        weight = state.weight / moved.rows.unsqueeze(1 - call.out_dim)
        weight = bf16.rounded(weight) if state.numeric == BF16 else weight
        return replace(state, weight=weight, bias=bias)
    integer = replace(state.integer, scale=moved.outputs(state.integer.scale))
    weight = own_layout(call, integer.dequantized()[None], state.weight)
    return replace(state, weight=weight, bias=bias, integer=integer)
