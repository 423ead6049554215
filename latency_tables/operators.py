"""What a network does, as a list of fused kernels with their sizes: the input of the roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zipc.core.types import Pattern

Precision = Literal["fp32", "fp16", "int8"]  # what the units of a device are fed with
BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class Product:
    """`batch` products (rows, channels x positions) by (channels x positions, columns).

    A convolution has a position for every element of its kernel and a batch for every group. What
    follows it point by point is fused and costs nothing but the `moved_bytes` it adds: those of
    all activations read and written once.
    """

    rows: int
    columns: int
    channels: int
    moved_bytes: int
    batch: int = 1
    positions: int = 1
    precision: Precision = "fp16"
    pattern: Pattern = "dense"

    @property
    def weight_bytes(self) -> int:
        """Those of the second factors, dense."""
        weights = self.batch * self.columns * self.channels * self.positions
        return weights * BYTES[self.precision]


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(q k') v of `heads` heads, with batch, in one kernel."""

    heads: int
    queries: int
    keys: int
    head_size: int
    precision: Precision = "fp16"

    @property
    def moved_bytes(self) -> int:
        values = self.heads * self.head_size * (2 * self.queries + 2 * self.keys)
        return values * BYTES[self.precision]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over activations: a normalisation, a softmax, a sum, a copy, a depthwise product.

    `flops` are done without tensor cores. A `fused` one is not launched: it belongs to a kernel
    before it.
    """

    moved_bytes: int
    flops: int = 0
    fused: bool = False


Operator = Product | Attention | Pass


def linear(
    rows: int,
    columns: int,
    channels: int,
    *,
    precision: Precision = "fp16",
    pattern: Pattern = "dense",
    written: Precision | None = None,
) -> Product:
    """A linear map over `rows` rows that writes in `written`, or in what it reads."""
    read, write = BYTES[precision], BYTES[written or precision]
    moved = rows * (channels * read + columns * write)
    return Product(rows, columns, channels, moved, precision=precision, pattern=pattern)


def convolution(
    image: tuple[int, int, int],
    out_channels: int,
    channels: int,
    *,
    kernel: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    groups: int = 1,
    precision: Precision = "fp16",
    pattern: Pattern = "dense",
    written: Precision | None = None,
    added: bool = False,
) -> Operator:
    """A convolution that gives an `image` (batch, height, width); `added`: it reads a residual.

    Groups of fewer than 8 channels run without tensor cores.
    """
    batch, height, width = image
    rows = batch * height * width
    read, write = BYTES[precision], BYTES[written or precision]
    seen = rows * stride[0] * stride[1]  # positions of the image it reads
    moved = seen * channels * read + rows * out_channels * write * (2 if added else 1)
    positions = kernel[0] * kernel[1]
    if groups > 1 and channels // groups < MIN_GROUP:
        flops = 2 * rows * out_channels * (channels // groups) * positions
        return Pass(moved + out_channels * (channels // groups) * positions * read, flops)
    return Product(
        rows,
        out_channels // groups,
        channels // groups,
        moved,
        batch=groups,
        positions=positions,
        precision=precision,
        pattern=pattern,
    )


MIN_GROUP = 8  # channels
