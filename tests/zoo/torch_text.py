"""A model of text made of torch's own layers, its attention taken apart as zipc does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.values import PAD, VOCABULARY, ready, tokens
from zipc.sources.multihead import part_attention_, parts_of

WIDTH, HEADS = 12, 4
AXES = {"input_ids": {0: "batch", 1: "sequence"}, "target": {0: "batch", 1: "target"}}


class EncoderDecoder(nn.Module):
    """Post-norm encoder, causal pre-norm decoder across it, and attention whose weights count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoderLayer(
            WIDTH, HEADS, WIDTH, norm_first=True, activation="gelu"
        )
        self.pool = nn.MultiheadAttention(WIDTH, HEADS, vdim=WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        padding = input_ids == PAD
        seen = self.encoder(self.embed_tokens(input_ids), src_key_padding_mask=padding)
        size = target.shape[1]
        later = torch.ones(size, size, dtype=torch.bool).triu(1)
        read = self.decoder(
            self.embed_tokens(target).transpose(0, 1),
            seen.transpose(0, 1),
            tgt_mask=later,
            memory_key_padding_mask=padding,
        ).transpose(0, 1)
        pooled, weights = self.pool(read.mean(1, keepdim=True), seen, seen, padding)
        return self.head(read + pooled), weights


def encoder_decoder() -> nn.Module:
    made = EncoderDecoder()
    part_attention_(made, list(parts_of(made)))
    return ready(made, pairs())


def pairs(*, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Ids with padding, and shorter ones without."""
    ids = tokens(batch=batch, length=length, seed=seed)["input_ids"]
    target = tokens(batch=batch, length=length - 3, seed=seed + 1)["input_ids"].clamp_min(4)
    return {"input_ids": ids, "target": target}
