"""`nn.MultiheadAttention` as zipc wants it traced: with linear maps of its own, whose heads can go.

Torch keeps the three projections in one matrix and splits it inside the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zipc.core.errors import UnsupportedModel
from zipc.sources.common import linear_of


class Attention(nn.Module):
    """What an `nn.MultiheadAttention` computes; its heads may become fewer.

    `nn.TransformerEncoderLayer` reads the last two attributes of it, and computes it by calling it.
    """

    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.head_dim = like.head_dim
        self.batch_first = like.batch_first
        if like.in_proj_weight is not None:
            weights: Sequence[Tensor] = like.in_proj_weight.chunk(3)
        else:
            weights = like.q_proj_weight, like.k_proj_weight, like.v_proj_weight
        whole = like.in_proj_bias
        biases = (None, None, None) if whole is None else whole.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(linear_of, weights, biases)
        self.out_proj = linear_of(like.out_proj.weight, like.out_proj.bias)

    def forward(
        self,
        query: Tensor,  # (b, l, d), or (l, b, d) without batch_first, or (l, d)
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # (b, s)
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # (l, s)
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention as `nn.MultiheadAttention` has it: output and, where needed, weights.

        Raises:
            UnsupportedModel: the mask differs between heads.
        """
        single = query.dim() == 2
        turned = not (single or self.batch_first)
        given = [query, key, value]
        if single:
            given = [x[None] for x in given]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif turned:
            given = [x.transpose(0, 1) for x in given]
        maps = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for f, x in zip(maps, given, strict=True)
        )
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _joined(attn_mask, key_padding_mask, q)
        found = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal
        )
        output = self.out_proj(found.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            if average_attn_weights:
                weights = weights.mean(1)
            weights = weights[0] if single else weights
        if single:
            return output[0], weights
        return output.transpose(0, 1) if turned else output, weights


def parts_of(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Those that an `Attention` can stand for, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and not module.add_zero_attn
        and not (module._forward_hooks or module._forward_pre_hooks)
    }


def part_attention_(model: nn.Module, paths: Sequence[str]) -> None:
    """Put an `Attention` in the place of each."""
    made: dict[int, Attention] = {}  # a module that is called from two places stays one
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, nn.MultiheadAttention):
            made.setdefault(id(module), Attention(module))
            model.set_submodule(path, made[id(module)])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # its fused path reads the matrix that is gone


def _joined(mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scores (b or 1, 1, l or 1, s); None where that is nothing."""
    if mask is not None and mask.dim() != 2:
        raise UnsupportedModel("nn.MultiheadAttention has a mask of its own for every head.")
    added = [
        torch.zeros_like(m, dtype=like.dtype).masked_fill(m, -torch.inf)
        if m.dtype == torch.bool
        else m
        for m in (
            None if mask is None else mask[None, None],
            None if padding is None else padding[:, None, None],
        )
        if m is not None
    ]
    return sum(added[1:], added[0]) if added else None
