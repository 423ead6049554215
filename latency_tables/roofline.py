"""How long a device takes for a list of fused kernels, from its data sheet and a few fractions.

A kernel takes as long as the slower of its arithmetic and its traffic (Williams, Waterman and
Patterson 2009), after a floor that every launch costs. Products are cut into tiles that run in
waves over the multiprocessors; the fastest of the usual tiles is taken, as TensorRT takes the
fastest of its tactics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zipc.core.types import SpecSheet
from zipc.latency_tables.operators import Attention, Operator, Pass, Precision, Product

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (32, 64), (64, 32))
SPLITS = (1, 2, 4, 8)  # parts of the summation, added up afterwards
DEPTH_STEP: dict[Precision, int] = {"fp32": 8, "fp16": 32, "int8": 64}  # summed at once
ALIGNED: dict[Precision, int] = {"fp32": 4, "fp16": 8, "int8": 32}  # to what TensorRT pads channels
SPARSE_ALIGNED: dict[Precision, int] = {"fp32": 8, "fp16": 16, "int8": 32}
SPARSE_BYTES: dict[Precision, float] = {"fp32": 17 / 32, "fp16": 9 / 16, "int8": 5 / 8}
IMAGE = 4  # channels: a convolution of fewer has kernels of its own, without padding to more
RAGGED = 2.0  # times slower than at the next aligned width: see anchors/orin.toml
QUERY_TILE = 64
RESIDENT = 0.5  # share of the cache that activations may fill and still be read from it

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fractions:
    """What of a data sheet is reached: the free parameters of a device, all positive.

    `launch_us` is the floor of a kernel; `tile` the mean edge, in elements, of a tile that loses
    half its time to loading; `cache` and `sparse` are the speeds of the cache and of 2:4 arithmetic
    relative to memory and to dense arithmetic; the others are fractions of a peak.
    """

    launch_us: float
    fp16: float
    int8: float
    bandwidth: float
    cache: float
    tile: float
    attention: float
    sparse: float


def milliseconds(operators: Sequence[Operator], sheet: SpecSheet, fractions: Fractions) -> float:
    """Of all operators, one after another."""
    return float(Kernels(operators, sheet).milliseconds(fractions).sum())


class Kernels:
    """The sizes of operators, laid out once so that many fractions can be tried on them."""

    def __init__(self, operators: Sequence[Operator], sheet: SpecSheet) -> None:
        self.sheet = sheet
        distinct = list(dict.fromkeys(operators))
        place = {operator: i for i, operator in enumerate(distinct)}
        self.order = np.array([place[operator] for operator in operators], dtype=np.intp)
        moved = np.array([float(o.moved_bytes) for o in distinct])
        self.resident = np.where(moved <= RESIDENT * sheet.l2_mb * 1e6, moved, 0.0)
        self.moved = moved - self.resident
        self.products = [(i, o) for i, o in enumerate(distinct) if isinstance(o, Product)]
        self.at = np.array([i for i, _ in self.products], dtype=np.intp)
        shapes = [o for _, o in self.products]
        self.weights = np.array([float(o.weight_bytes) for o in shapes])
        self.dense = _tiled(shapes, sheet, ALIGNED)
        self.halved = _tiled(shapes, sheet, SPARSE_ALIGNED)
        self.sparse = np.array([o.pattern == "2:4" and sheet.sparse for o in shapes], dtype=bool)
        self.kept = np.array([SPARSE_BYTES[o.precision] for o in shapes])
        self.int8 = np.array([o.precision == "int8" for o in shapes], dtype=bool)
        self.other = np.array([_other_work(o, sheet) for o in distinct])
        self.launched = np.array([not (isinstance(o, Pass) and o.fused) for o in distinct])
        self.attention = np.array([isinstance(o, Attention) for o in distinct], dtype=bool)

    def milliseconds(self, fractions: Fractions) -> Array:
        """Of every operator, in the order they were given."""
        memory = self.sheet.bandwidth_gbs * 1e6 * fractions.bandwidth  # bytes a millisecond
        traffic = (self.moved + self.resident / fractions.cache) / memory
        found = np.maximum(
            np.where(self.attention, self.other / fractions.attention, self.other), traffic
        )
        if self.products:
            speed = np.where(self.int8, fractions.int8, fractions.fp16)
            found[self.at] = self._products(traffic[self.at], memory, speed, fractions)
        result: Array = (found + self.launched * fractions.launch_us / 1e3)[self.order]
        return result

    def _products(self, traffic: Array, memory: float, speed: Array, fractions: Fractions) -> Array:
        weights = self.weights / memory
        partial = memory * fractions.cache
        edges = 1 + fractions.tile * EDGES
        dense = self.dense.work * edges / speed[:, None] + self.dense.partial_bytes / partial
        dense_ms = np.maximum(dense.min(axis=1), traffic + weights)
        halved = self.halved.work * edges / (speed * fractions.sparse)[:, None]
        halved += self.halved.partial_bytes / partial
        sparse_ms = np.maximum(halved.min(axis=1), traffic + weights * self.kept)
        found: Array = np.where(self.sparse, np.minimum(dense_ms, sparse_ms), dense_ms)
        return found


@dataclass(frozen=True, slots=True)
class _Tiled:
    work: Array  # (products, tilings): milliseconds of the busiest multiprocessor at its peak
    partial_bytes: Array  # (products, tilings): of the parts of a split summation


TILINGS = [(rows, columns, split) for rows, columns in TILES for split in SPLITS]
EDGES = np.array([(1 / rows + 1 / columns) / 2 for rows, columns, _ in TILINGS])


def _tiled(shapes: Sequence[Product], sheet: SpecSheet, aligned: dict[Precision, int]) -> _Tiled:
    tilings = np.array(TILINGS, dtype=np.float64)  # (tilings, 3)
    rows, columns, splits = tilings.T
    work = np.zeros((len(shapes), len(TILINGS)))
    partial = np.zeros_like(work)
    for i, shape in enumerate(shapes):
        to, step = aligned[shape.precision], DEPTH_STEP[shape.precision]
        image = shape.channels <= IMAGE
        depth = shape.positions * _up(shape.channels, IMAGE if image else to)
        tiles = shape.batch * np.ceil(shape.rows / rows)
        tiles *= np.ceil(shape.columns / columns)
        waves = np.ceil(tiles * splits / sheet.multiprocessors)
        summed = np.ceil(depth / splits / step) * step
        ragged = shape.columns % 8 or (shape.channels % 8 and not image)
        work[i] = waves * 2 * rows * columns * summed / _peak(sheet, shape.precision)
        work[i] *= RAGGED if ragged else 1.0
        partial[i] = np.where(
            splits > 1, 8.0 * splits * shape.batch * shape.rows * shape.columns, 0
        )
    return _Tiled(work, partial)


def _other_work(operator: Operator, sheet: SpecSheet) -> float:
    """Milliseconds of arithmetic at the peak, of all but products."""
    if isinstance(operator, Attention):
        blocks = operator.heads * -(-operator.queries // QUERY_TILE)
        waves = -(-blocks // sheet.multiprocessors)
        flops = 4 * waves * QUERY_TILE * operator.keys * operator.head_size
        return flops / _peak(sheet, operator.precision)
    if isinstance(operator, Pass):
        return operator.flops / (sheet.fp32_tflops * 1e9)
    return 0.0


def _peak(sheet: SpecSheet, precision: Precision) -> float:
    """Operations a millisecond of one multiprocessor."""
    tera = {"fp32": sheet.fp32_tflops, "fp16": sheet.fp16_tflops, "int8": sheet.int8_tops}
    return tera[precision] * 1e9 / sheet.multiprocessors


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
