"""Parameter values under which nothing is idle, and inputs drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

VOCABULARY = 60
PAD = 1


def ready(module: nn.Module, feeds: Mapping[str, Tensor], *, seed: int = 0) -> nn.Module:
    """Give `module` values under which `feeds` wakes every unit; evaluation mode, no gradients."""
    module.eval().requires_grad_(False)
    randomise_(module, seed=seed)
    settle_(module, feeds, seed=seed)
    return module


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
                    value.copy_(uniform(value.shape, 0.1, 0.4) * normal(value.shape, 1.0).sign())
            if isinstance(owner, _NormBase) and owner.running_mean is not None:
                owner.running_mean.copy_(normal(owner.running_mean.shape, 0.3))
                assert owner.running_var is not None
                owner.running_var.copy_(uniform(owner.running_var.shape, 1.0, 2.0))


def settle_(module: nn.Module, feeds: Mapping[str, Tensor], *, seed: int = 0) -> None:
    """Centre what reaches the activations, so that no unit is dead, and scale filters to 1.

    One pass in order of execution; a module that is called twice counts at its first call, and
    one without bias stays off centre. Offsets of up to half a deviation remain everywhere.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    seen: set[nn.Module] = set()

    def offset(value: Tensor, axis: int) -> Tensor:
        """The mean of every channel, missed by up to half a deviation."""
        rows = value.transpose(axis, -1).flatten(0, -2)
        std, mean = torch.std_mean(rows, 0)
        return mean + (torch.rand(mean.shape, generator=generator) - 0.5) * std

    def settle(owner: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if owner in seen:
            return out
        seen.add(owner)
        if isinstance(owner, _ConvNd):
            std = out.transpose(1, -1).flatten(0, -2).std(0).clamp(min=1e-3)  # of each channel
            if owner.transposed:  # the outputs are not the first axis: one scale for all
                std = std.square().mean().sqrt()[None]
            owner.weight.div_(std.view(-1, *[1] * (owner.weight.dim() - 1)))
            out = type(owner).forward(owner, *args)
        if isinstance(owner, _NormBase):
            if owner.running_mean is not None:
                owner.running_mean.copy_(offset(args[0], 1))
        elif isinstance(owner.bias, Tensor):
            owner.bias.sub_(offset(out, -1 if isinstance(owner, nn.Linear) else 1))
        return type(owner).forward(owner, *args)  # type: ignore[no-any-return]

    kinds = (_ConvNd, nn.Linear, _NormBase)
    handles = [m.register_forward_hook(settle) for m in module.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            module(**feeds)
    finally:
        for handle in handles:
            handle.remove()


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


def images(*, batch: int = 2, size: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Square images with three channels."""
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, 3, size, size, generator=generator)}


def sounds(*, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, 1, 60, generator=generator)}


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
