"""Compensators: who repairs the weights of the units that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from zipc.pruner.compensate.least_squares import REFIT_DAMP, refit, shifted_bias, split


class Compensator(Protocol):
    """Takes the dense layer and its centred input statistics, gives the layer on `keep`."""

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        centred_gram: Tensor,
        mean: Tensor,
        *,
        keep: Tensor,
        damp: float = REFIT_DAMP,
    ) -> tuple[Tensor, Tensor]: ...


def correct_bias(
    weight: Tensor,
    bias: Tensor | None,
    centred_gram: Tensor,
    mean: Tensor,
    *,
    keep: Tensor,
    damp: float = REFIT_DAMP,
) -> tuple[Tensor, Tensor]:
    """Keep the weights as they are; the bias makes up for the mean of what is gone."""
    columns, _ = split(keep, weight.shape[1])
    kept = weight[:, columns]
    return kept, shifted_bias(weight, bias, mean, columns, kept).to(weight.dtype)


def leave(
    weight: Tensor,
    bias: Tensor | None,
    centred_gram: Tensor,
    mean: Tensor,
    *,
    keep: Tensor,
    damp: float = REFIT_DAMP,
) -> tuple[Tensor, Tensor]:
    """Slice and repair nothing."""
    columns, _ = split(keep, weight.shape[1])
    return weight[:, columns], weight.new_zeros(weight.shape[0]) if bias is None else bias.clone()


COMPENSATORS: Mapping[str, Compensator] = MappingProxyType(
    {"least_squares": refit, "bias": correct_bias, "none": leave}
)
