"""Parameter values under which nothing is idle, and inputs drawn from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

VOCABULARY = 60
PAD = 1


def ready(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """Give `module` values that matter, in evaluation mode and without gradients."""
    randomise_(module, seed=seed)
    return module.eval().requires_grad_(False)


def randomise_(module: nn.Module, *, seed: int = 0) -> None:
    """Draw every parameter and running statistic anew.

    Matrices and filters are scaled by their fan-in, so that activations stay near 1; biases and
    norms are far from 0 and 1, so that a forgotten one shows.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: torch.Size, low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def normal(shape: torch.Size, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    with torch.no_grad():
        for owner in module.modules():
            for name, value in owner.named_parameters(recurse=False):
                if value.dim() >= 2:
                    value.copy_(normal(value.shape, 1.4 / math.sqrt(_fan_in(owner, value))))
                elif name == "weight":  # the scale of a norm, or the slopes of a PReLU
                    value.copy_(uniform(value.shape, 0.5, 1.5))
                else:
                    value.copy_(normal(value.shape, 0.3))
            if isinstance(owner, _NormBase) and owner.running_mean is not None:
                owner.running_mean.copy_(normal(owner.running_mean.shape, 0.3))
                assert owner.running_var is not None
                owner.running_var.copy_(uniform(owner.running_var.shape, 1.0, 2.0))


def _fan_in(owner: nn.Module, value: Tensor) -> int:
    """How many terms are summed for one output: transposed layouts hold them in other axes."""
    if isinstance(owner, nn.Embedding):
        return 2
    if isinstance(owner, nn.ConvTranspose2d):
        step = owner.stride[0] * owner.stride[1]
        return max(1, value.shape[0] // owner.groups * value[0, 0].numel() // step)
    if type(owner).__name__ == "Conv1D":  # GPT-2 keeps its matrices as (in, out)
        return value.shape[0]
    if value.dim() == 3:  # a stack of matrices, one per expert
        return value.shape[-1]
    return value[0].numel()


def images(*, batch: int = 2, size: int = 32, seed: int = 0, name: str = "x") -> dict[str, Tensor]:
    """Square images with three channels, under the input name `name`."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, 3, size, size, generator=generator)}


def tokens(
    *, batch: int = 2, length: int = 7, seed: int = 0, types: bool = False
) -> dict[str, Tensor]:
    """Token ids with up to two of padding in the last row; with `types`, token types as well.

    More padding than a sliding window reaches back over would leave tokens that see nothing, and
    what comes out for those differs between torch and ONNX Runtime.
    """
    padding = min(2, length // 2)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - padding :] = 0
    ids[-1, length - padding :] = PAD
    feeds = {"input_ids": ids, "attention_mask": mask}
    if types:
        feeds["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    return feeds
