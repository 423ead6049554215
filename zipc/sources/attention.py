"""Attention as zipc wants it traced; transformers calls it by registered name.

It is one `aten.scaled_dot_product_attention(q, k, v, mask, is_causal, scale, enable_gqa)`
with q (b, heads, s, d) and k, v (b, kv_heads, s, d). The mask is

- None, where every token sees every other; with is_causal=True, where it sees those before it;
- bool (b, 1, 1, s), the padding of a bidirectional encoder;
- bool (b, 1, s, s), padding and a causal or sliding pattern;
- float, where a position bias is added to the scores (T5, Swin).

The stock functions say the same with index arithmetic and repeated keys that end up in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zipc.core.errors import UnsupportedModel

ATTENTION = "zipc"
MASKED = -1e9  # a score that Softmax turns into zero, without the NaN of a row of infinities


def register_attention() -> None:
    """Make `attn_implementation="zipc"` known."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, attention_mask)


def attention(
    module: nn.Module,
    query: Tensor,  # (b, heads, s, d)
    key: Tensor,  # (b, kv_heads, s, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,  # (1 or b, heads, s, s)
    **rest: Any,
) -> tuple[Tensor, None]:
    """Scaled dot product attention, (b, s, heads, d).

    Raises:
        UnsupportedModel: the model wants capped scores or attention sinks.
    """
    for name in ("softcap", "s_aux"):
        if rest.get(name) is not None:
            raise UnsupportedModel(f"{type(module).__name__} needs attention with {name}.")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(query.shape[2] > 1 and attention_mask is None and causal)
    if position_bias is not None and not _crosses(module):
        attention_mask, causal = _biased(position_bias, attention_mask, causal=causal), False
    found = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return found.transpose(1, 2).contiguous(), None


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of `attention`, from what transformers' masking functions hand over."""
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sdpa_mask,
    )

    pattern = kwargs.get("mask_function")
    if args or pattern is None or kwargs.get("use_vmap") or "q_length" not in kwargs:
        return sdpa_mask(*args, **kwargs)  # not a pattern of indices, or an older transformers
    padding: Tensor | None = kwargs.get("attention_mask")  # (b, s)
    if padding is not None:
        padding = padding[:, None, None, :].to(torch.bool)
    if pattern is bidirectional_mask_function:
        return padding
    q_length, kv_length = kwargs["q_length"], kwargs["kv_length"]
    q_offset, kv_offset = kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0)
    if isinstance(q_offset, Tensor) or not _is_zero(kv_offset):
        return sdpa_mask(*args, **kwargs)
    if pattern is causal_mask_function and padding is None and _is_zero(q_offset):
        return None
    if pattern is causal_mask_function and isinstance(q_length, int) and q_length == 1:
        return padding  # the newest token sees all others
    device = kwargs.get("device", "cpu")
    queries = torch.arange(q_length, device=device)
    if not _is_zero(q_offset):
        queries = queries + q_offset
    queries = queries[None, None, :, None]
    keys = torch.arange(kv_length, device=device)[None, None, None]
    batch = torch.arange(kwargs["batch_size"], device=device)[:, None, None, None]
    seen: Tensor = pattern(batch, batch[:1], queries, keys)  # (b or 1, 1, q, kv)
    if padding is None:
        return seen
    if pattern is not causal_mask_function:  # a window of padding only: see something, yourself
        padding = padding | (queries == keys)
    return seen & padding


def _crosses(module: nn.Module) -> bool:
    """Whether a decoder looks at its encoder here: the position bias is then all zeros."""
    return bool(getattr(module, "is_decoder", False)) and not getattr(module, "is_causal", True)


def _biased(bias: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    if mask is None and causal:
        place = torch.arange(bias.shape[-1], device=bias.device)
        mask = place <= place[:, None]
    if mask is None:
        return bias
    return torch.where(mask, bias, MASKED) if mask.dtype == torch.bool else bias + mask


def _is_zero(offset: Any) -> bool:
    return isinstance(offset, int) and offset == 0
