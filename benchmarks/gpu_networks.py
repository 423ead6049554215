"""Transformer stacks in plain torch, whose linear maps run in halves, on integers or 2:4 sparse.

What `bench_gpu.py` times. A stack is made of parts, two a layer: attention, and a feed-forward part
with its sum and its norm. All variants of a shape have the same weights, cut, rounded or made
sparse, so that each can be held against floats with the weights that it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from zipc.numerics.sparsity import largest as largest_of

HEAD = 64
ROWS = 32  # cuSPARSELt takes multiples of so many rows of integers
MIN_ROWS = 32  # torch._int_mm wants more than 16
LARGEST = 127  # of a symmetric signed byte

Map = Callable[[Tensor], Tensor]  # (n, inputs) -> (n, outputs)
Part = Callable[[Tensor], Tensor]  # (batch, sequence, hidden) -> the same


@dataclass(frozen=True, slots=True)
class Shape:
    """A stack of layers; heads have 64 dimensions."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    sequence: int
    gated: bool = False  # as in a Llama: RMSNorm, rotary positions, a gate, no biases

    def halved(self) -> Shape:
        """Half the heads and half the feed-forward width of every layer."""
        return replace(
            self, heads=self.heads // 2, kv_heads=max(1, self.kv_heads // 2), ffn=self.ffn // 2
        )


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a shape."""

    halved: bool
    numeric: str  # fp16 | int8
    pattern: str  # dense | 2:4

    @property
    def name(self) -> str:
        kept = "half the units" if self.halved else "all units"
        return f"{kept}, {self.numeric}, {self.pattern}"


@dataclass(frozen=True, slots=True)
class Weight:
    """A linear map's weight (outputs, inputs) and bias (outputs), in floats."""

    weight: Tensor
    bias: Tensor | None


Layer = Mapping[str, Weight]


def random_layers(shape: Shape, device: str, dtype: torch.dtype, *, seed: int = 0) -> list[Layer]:
    """Weights of all layers, alike in size to those that are trained."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight(outputs: int, inputs: int) -> Weight:
        made = torch.randn(outputs, inputs, device=device, dtype=dtype, generator=generator)
        bias = None if shape.gated else torch.zeros(outputs, device=device, dtype=dtype)
        return Weight(made / math.sqrt(inputs), bias)

    queries, keys = shape.heads * HEAD, shape.kv_heads * HEAD
    sizes = {
        "qkv": (queries + 2 * keys, shape.hidden),
        "out": (shape.hidden, queries),
        "up": (shape.ffn * (2 if shape.gated else 1), shape.hidden),
        "down": (shape.hidden, shape.ffn),
    }
    return [{name: weight(*size) for name, size in sizes.items()} for _ in range(shape.layers)]


def quantise(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def scale_back(sums: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums * scale
    return (y if bias is None else y + bias).to(dtype)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gate(x: Tensor) -> Tensor:
    gates, values = x.chunk(2, dim=-1)
    return F.silu(gates) * values


def sum_and_norm(x: Tensor, y: Tensor) -> Tensor:
    return F.layer_norm(x + y, x.shape[-1:])


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions of (batch, heads, sequence, 64)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


@dataclass(frozen=True, slots=True)
class Glue:
    """What stands between the products; fused where the compiler of torch works."""

    quantise: Callable[..., Tensor] = quantise
    scale_back: Callable[..., Tensor] = scale_back
    gelu: Callable[..., Tensor] = gelu
    gate: Callable[..., Tensor] = gate
    sum_and_norm: Callable[..., Tensor] = sum_and_norm
    rotate: Callable[..., Tensor] = rotate

    def fused(self) -> Glue:
        names = self.__dataclass_fields__
        made = {name: torch.compile(getattr(self, name), dynamic=True) for name in names}
        return Glue(**made)


def float_map(held: Weight) -> Map:
    return lambda x: F.linear(x, held.weight, held.bias)


def sparse_map(held: Weight) -> Map:
    """2:4 weights in halves, by cuSPARSELt."""
    packed = torch._cslt_compress(held.weight)

    def run(x: Tensor) -> Tensor:
        taken = _filled(x, 8)
        y = torch._cslt_sparse_mm(packed, taken.t(), bias=held.bias, transpose_result=True)
        return y[: len(x)]

    return run


def integer_map(held: Weight, largest: Tensor, glue: Glue) -> Map:
    """Weights and inputs in bytes, a scale an output and one for all inputs."""
    rounded, scales, scale = _rounded(held.weight, largest)
    both = scales * scale
    dtype = held.weight.dtype
    columns = rounded.t()

    def run(x: Tensor) -> Tensor:
        taken = glue.quantise(x if len(x) >= MIN_ROWS else _filled(x, MIN_ROWS), scale)
        sums = torch._int_mm(taken, columns)[: len(x)]
        return glue.scale_back(sums, both, held.bias, dtype)

    return run


def sparse_integer_map(held: Weight, largest: Tensor, glue: Glue) -> Map:
    """Both: 2:4 weights in bytes, by cuSPARSELt, which scales the outputs."""
    rounded, scales, scale = _rounded(held.weight, largest)
    packed = torch._cslt_compress(rounded)
    both = (scales * scale).float().contiguous()
    dtype = held.weight.dtype

    def run(x: Tensor) -> Tensor:
        taken = glue.quantise(_filled(x, ROWS), scale)
        y = torch._cslt_sparse_mm(
            packed, taken.t(), alpha=both, out_dtype=dtype, transpose_result=True
        )[: len(x)]
        return y if held.bias is None else y + held.bias

    return run


def _filled(x: Tensor, rows: int) -> Tensor:
    """Rows of zeros up to a multiple."""
    missing = -len(x) % rows
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _rounded(weight: Tensor, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of a weight, their scales (outputs), and the scale of what it is multiplied with."""
    scales = weight.abs().amax(dim=1).float() / LARGEST
    rounded = (weight / scales[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return rounded, scales, (largest.float() / LARGEST)


def parts_of(shape: Shape, maps: Mapping[str, Map], glue: Glue, x: Tensor) -> tuple[Part, Part]:
    """Attention and feed-forward of one layer, for inputs like `x` (batch, sequence, hidden)."""
    queries, keys = shape.heads * HEAD, shape.kv_heads * HEAD
    batch, sequence, hidden = x.shape
    angles = torch.arange(sequence, device=x.device)[:, None] * (
        10_000.0 ** (-torch.arange(0, HEAD, 2, device=x.device) / HEAD)
    )
    turns = torch.cat((angles, angles), dim=-1)
    cosines, sines = turns.cos().to(x.dtype), turns.sin().to(x.dtype)

    def apart(y: Tensor) -> Tensor:
        return y.view(batch, sequence, -1, HEAD).transpose(1, 2)

    def normed(y: Tensor) -> Tensor:
        return F.rms_norm(y, (hidden,)) if shape.gated else y

    def added(y: Tensor, more: Tensor) -> Tensor:
        return y + more if shape.gated else glue.sum_and_norm(y, more)

    def attention(y: Tensor) -> Tensor:
        q, k, v = maps["qkv"](normed(y).flatten(0, 1)).split([queries, keys, keys], dim=-1)
        q, k, v = apart(q), apart(k), apart(v)
        if shape.gated:
            q, k = glue.rotate(q, cosines, sines), glue.rotate(k, cosines, sines)
        grouped = shape.kv_heads != shape.heads
        z = F.scaled_dot_product_attention(q, k, v, is_causal=shape.gated, enable_gqa=grouped)
        return added(y, maps["out"](z.transpose(1, 2).reshape(-1, queries)).view(y.shape))

    def feed_forward(y: Tensor) -> Tensor:
        z = maps["up"](normed(y).flatten(0, 1))
        z = glue.gate(z) if shape.gated else glue.gelu(z)
        return added(y, maps["down"](z).view(y.shape))

    return attention, feed_forward


@dataclass(frozen=True, slots=True)
class Stack:
    """A network ready to run: its parts in order, and its outputs in floats with its weights."""

    parts: Sequence[Part]
    expected: Tensor

    def run(self, x: Tensor) -> Tensor:
        return _through(self.parts, x)

    def alone(self, kind: int) -> Part:
        """Every attention (0) or every feed-forward part (1) of the stack, one after another."""
        return partial(_through, self.parts[kind::2])


def build(shape: Shape, variant: Variant, glue: Glue, x: Tensor) -> Stack:
    """A variant of a shape, its ranges those of `x` (batch, sequence, hidden).

    Raises:
        RuntimeError: torch has no such kernel on this device.
    """
    shape = shape.halved() if variant.halved else shape
    parts: list[Part] = []
    y = x
    for layer in random_layers(shape, str(x.device), x.dtype):
        if variant.pattern == "2:4":
            layer = {
                n: replace(w, weight=w.weight * largest_of(w.weight.abs(), kept=2, of=4))
                for n, w in layer.items()
            }
        largest: dict[str, Tensor] = {}
        noted = {n: _noting(float_map(w), n, largest) for n, w in layer.items()}
        for part in parts_of(shape, noted, Glue(), y):
            y = part(y)
        maps = {n: _map(w, variant, largest[n], glue) for n, w in layer.items()}
        parts += parts_of(shape, maps, glue, x)
    return Stack(parts, y)


def _map(held: Weight, variant: Variant, largest: Tensor, glue: Glue) -> Map:
    if variant.numeric == "int8":
        made = sparse_integer_map if variant.pattern == "2:4" else integer_map
        return made(held, largest, glue)
    return sparse_map(held) if variant.pattern == "2:4" else float_map(held)


def _noting(run: Map, name: str, largest: dict[str, Tensor]) -> Map:
    def noting(x: Tensor) -> Tensor:
        largest[name] = x.abs().amax()
        return run(x)

    return noting


def _through(parts: Sequence[Part], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x
