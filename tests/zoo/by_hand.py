"""Attention as people write it: sizes taken from the input, einsum, keys repeated for groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo import Family
from tests.zoo.huggingface import deberta
from tests.zoo.values import images, ready, tokens

WIDTH, HEADS, SIZE, LENGTH, FEATURES = 24, 4, 6, 9, 5


class Einsum(nn.Module):
    """Scores and their use as sums over letters."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE, bias=False)
        self.to_out = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, HEADS, -1) for t in self.to_qkv(x).chunk(3, dim=-1))
        scores = torch.einsum("b i h d, b j h d -> b h i j", q, k) * SIZE**-0.5
        out = torch.einsum("b h i j, b j h d -> b i h d", scores.softmax(-1), v)
        return self.to_out(out.reshape(b, n, -1))


class Grouped(nn.Module):
    """Two heads share a key and a value, which are repeated; positions by rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
        self.k = nn.Linear(WIDTH, HEADS // 2 * SIZE, bias=False)
        self.v = nn.Linear(WIDTH, HEADS // 2 * SIZE, bias=False)
        self.o = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        angles = torch.outer(torch.arange(LENGTH), torch.tensor([1.0, 0.3, 0.1]))
        self.register_buffer("angles", angles, persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        cos, sin = self.angles.cos()[None, :, None], self.angles.sin()[None, :, None]
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.rotated(self.q(x).view(b, n, HEADS, SIZE))
        k = self.rotated(self.k(x).view(b, n, HEADS // 2, SIZE)).repeat_interleave(2, dim=2)
        v = self.v(x).view(b, n, HEADS // 2, SIZE).repeat_interleave(2, dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).contiguous().view(b, n, -1))


class Biased(nn.Module):
    """A bias for every distance and head; sizes of heads taken from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.zeros(2 * LENGTH - 1, HEADS))
        at = torch.arange(LENGTH)
        self.register_buffer("index", at[:, None] - at[None] + LENGTH - 1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1) + bias.unsqueeze(0)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Normalised(nn.Module):
    """Queries and keys of length 1, and a temperature of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        out = (scores * self.temperature).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = attention()
        self.up, self.down = nn.Linear(WIDTH, 2 * 7), nn.Linear(7, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class Encoder(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList(Block(attention) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class Attention(nn.Module):
    """What most vision transformers have."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class Vit(nn.Module):
    """Patches, a token that stands for the image, blocks, and a head on that token."""

    def __init__(
        self, width: int = 24, heads: int = 4, depth: int = 2, *, patch: int = 4, size: int = 16
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.image = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "attention": Attention(width, heads),
                    "norm2": nn.LayerNorm(width),
                    "mlp": nn.Sequential(
                        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                    ),
                }
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.image.expand(x.shape[0], -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class Latents(nn.Module):
    """A few learnt vectors, the same for each row of the batch, that read the input."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(3, WIDTH))
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(FEATURES, 2 * WIDTH)
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.unsqueeze(0).repeat(x.shape[0], 1, 1)
        k, v = self.kv(x).chunk(2, -1)

        def parted(t: Tensor) -> Tensor:
            return t.view(x.shape[0], -1, HEADS, SIZE).transpose(1, 2)

        read = F.scaled_dot_product_attention(parted(self.q(latents)), parted(k), parted(v))
        latents = latents + self.out(read.transpose(1, 2).reshape(x.shape[0], -1, WIDTH))
        logits: Tensor = self.head(latents.mean(1))
        return logits


def rows(*, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, LENGTH, FEATURES, generator=generator)}


_TEXT = {0: "batch", 1: "sequence"}


def _family(name: str, make: Callable[[], nn.Module]) -> Family:
    return Family(name, lambda: ready(make(), rows()), rows, {"x": {0: "batch"}}, "rows")


BY_HAND: dict[str, Family] = {
    f.name: f
    for f in (
        _family("einsum", partial(Encoder, Einsum)),
        _family("grouped", partial(Encoder, Grouped)),
        _family("biased", partial(Encoder, Biased)),
        _family("normalised", partial(Encoder, Normalised)),
        _family("latents", Latents),
        Family(
            "vit",
            lambda: ready(Vit(), images(size=16)),
            partial(images, size=16),
            {"x": {0: "batch"}},
            "image",
        ),
        Family("deberta", deberta, tokens, dict.fromkeys(tokens(), _TEXT), "text", float64=False),
    )
}
