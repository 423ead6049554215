"""Causal models with learned positions: padding on the left must not shift the tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zipc.sources.common import SourceModel, forward_parameters

SAME = 1e-3  # relative
PADDING = 3  # tokens


def settle_positions_(source: SourceModel) -> None:
    """Let positions follow the padding where the model itself counts padding as tokens.

    Models with relative positions need nothing; where nothing helps, a note says so.
    """
    if _ignores_padding(source):
        return
    if "position_ids" in forward_parameters(source.module):
        handle = follow_padding_(source.module)
        if _ignores_padding(source):
            source.recipe["positions"] = "mask"
            return
        handle.remove()
    source.notes.append(
        f"{type(source.module).__name__} counts padding on the left as tokens: pad on the right"
    )


def follow_padding_(module: nn.Module) -> RemovableHandle:
    """Number the tokens of each row from the first that is not padding."""
    return module.register_forward_pre_hook(_add_positions, with_kwargs=True)


def _ignores_padding(source: SourceModel) -> bool:
    """Whether a sequence padded on the left gives the logits it gives alone."""
    length = min(8, source.max_length - PADDING)
    if "attention_mask" not in source.inputs or length < 2:
        return True
    ids = source.example(batch=2, length=length)["input_ids"][:1]
    padded = torch.cat([ids[:, :1].expand(1, PADDING), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :PADDING] = 0
    with torch.no_grad():
        alone = source.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        beside = source.module(input_ids=padded, attention_mask=mask).logits[:, PADDING:]
    return bool((alone - beside).norm() <= SAME * alone.norm())


def _add_positions(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    mask = given.get("attention_mask")
    if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return args, kwargs
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    if given.get("past_key_values") is not None:
        positions = positions[:, -given["input_ids"].shape[1] :]
    return args, {**kwargs, "position_ids": positions}
