"""Networks whose latency is published, as the kernels TensorRT (or another runtime) runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from zipc.core.errors import UsageError
from zipc.core.types import Pattern
from zipc.latency_tables.operators import (
    BYTES,
    Attention,
    Operator,
    Pass,
    Precision,
    convolution,
    linear,
)

Style = Literal["whole", "linear", "fastertransformer"]  # what runs in INT8, and what is fused


@dataclass(frozen=True, slots=True)
class Setting:
    """How a network runs. `size` is the length of a text, the edge of a square image in pixels.

    In the style "linear" nothing but linear maps and convolutions is in INT8; FasterTransformer
    runs in INT8 as a whole and fuses neither biases nor activations into products.
    """

    batch: int
    size: int
    precision: Precision = "fp16"
    pattern: Pattern = "dense"
    style: Style = "whole"

    @property
    def between(self) -> Precision:
        """What activations are kept in."""
        return "fp16" if self.style == "linear" else self.precision


def kernels(network: str, setting: Setting) -> list[Operator]:
    """The kernels of a network by name.

    Raises:
        UsageError: it is not known.
    """
    if network not in NETWORKS:
        raise UsageError(f"No network '{network}'. Choose from: {', '.join(NETWORKS)}.")
    return NETWORKS[network](setting)


def encoder(
    setting: Setting, *, layers: int, hidden: int, tokens: int | None = None
) -> list[Operator]:
    """Transformer layers with heads of 64 and feed-forward maps four times as wide."""
    tokens = setting.size if tokens is None else tokens
    rows, size = setting.batch * tokens, BYTES[setting.between]
    heads = setting.batch * hidden // 64
    unfused = setting.style == "fastertransformer"

    def dense(columns: int, channels: int) -> Operator:
        return linear(
            rows,
            columns,
            channels,
            precision=setting.precision,
            pattern=setting.pattern,
            written=setting.between,
        )

    def pass_over(width: int) -> Pass:
        return Pass(rows * width * size)

    layer: list[Operator] = [
        dense(3 * hidden, hidden),
        *([pass_over(6 * hidden)] if unfused else []),
        Attention(heads, tokens, tokens, 64, setting.between),
        *([pass_over(2 * hidden)] if unfused else []),
        dense(hidden, hidden),
        pass_over(3 * hidden),
        dense(4 * hidden, hidden),
        *([pass_over(8 * hidden)] if unfused else []),
        dense(hidden, 4 * hidden),
        pass_over(3 * hidden),
    ]
    return layer * layers


def feed_forwards(setting: Setting, *, layers: int, hidden: int) -> list[Operator]:
    """Pairs of linear maps with a ReLU between, nothing else."""
    rows = setting.batch * setting.size

    def dense(columns: int, channels: int) -> Operator:
        return linear(rows, columns, channels, precision=setting.precision, pattern=setting.pattern)

    return [dense(4 * hidden, hidden), dense(hidden, 4 * hidden)] * layers


def vision_transformer(setting: Setting, *, layers: int, hidden: int) -> list[Operator]:
    """Patches of 16, a class token."""
    edge = setting.size // 16
    patches = convolution((setting.batch, edge, edge), hidden, 3, kernel=(16, 16), stride=(16, 16))
    tokens = edge * edge + 1
    head = linear(setting.batch, 1000, hidden)
    return [patches, *encoder(setting, layers=layers, hidden=hidden, tokens=tokens), head]


@dataclass(slots=True)
class Image:
    """Collects the convolutions of a network; `edge` is that of the current image, in pixels.

    `activated`: a SiLU, which TensorRT runs as a pass of its own, follows each of them.
    """

    setting: Setting
    edge: int
    activated: bool = False
    found: list[Operator] = field(default_factory=list)

    def conv(
        self,
        out: int,
        channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        added: bool = False,
    ) -> int:
        """Append a convolution; returns its channels."""
        self.edge = -(-self.edge // stride)
        self.found.append(
            convolution(
                (self.setting.batch, self.edge, self.edge),
                out,
                channels,
                kernel=(kernel, kernel),
                stride=(stride, stride),
                groups=groups,
                precision=self.setting.precision,
                pattern=self.setting.pattern,
                added=added,
            )
        )
        if self.activated:
            self.copy(out)
        return out

    def copy(self, channels: int, *, times: int = 2) -> None:
        """Append a pass that reads and writes the current image, `times` in all."""
        values = self.setting.batch * self.edge**2 * channels
        self.found.append(Pass(times * values * BYTES[self.setting.precision]))


def residual_network(
    setting: Setting, *, blocks: tuple[int, ...], bottleneck: bool
) -> list[Operator]:
    """ResNet of version 1: sums and activations are fused into the convolutions before them."""
    image = Image(setting, setting.size)
    channels = image.conv(64, 3, kernel=7, stride=2)
    image.edge //= 2
    image.copy(channels, times=5)  # max pooling reads four times what it writes
    for stage, count in enumerate(blocks):
        width = 64 << stage
        out = width * (4 if bottleneck else 1)
        for block in range(count):
            stride = 2 if stage and not block else 1
            if channels != out or stride > 1:
                before = image.edge
                image.conv(out, channels, stride=stride)
                image.edge = before
            if bottleneck:
                image.conv(width, channels)
                image.conv(width, width, kernel=3, stride=stride)
                image.conv(out, width, added=True)
            else:
                image.conv(width, channels, kernel=3, stride=stride)
                image.conv(out, width, kernel=3, added=True)
            channels = out
    image.copy(channels)
    return [*image.found, linear(setting.batch, 1000, channels, precision=setting.precision)]


def mobilenet_v1(setting: Setting) -> list[Operator]:
    image = Image(setting, setting.size)
    channels = image.conv(32, 3, kernel=3, stride=2)
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
    for out, stride in (*plan, *[(512, 1)] * 5, (1024, 2), (1024, 1)):
        image.conv(channels, channels, kernel=3, stride=stride, groups=channels)
        channels = image.conv(out, channels)
    image.copy(channels)
    return [*image.found, linear(setting.batch, 1000, channels, precision=setting.precision)]


def mobilenet_v2(setting: Setting) -> list[Operator]:
    image = Image(setting, setting.size)
    channels = image.conv(32, 3, kernel=3, stride=2)
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)]
    for expand, out, count, first in (*plan, (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
        for block in range(count):
            stride, wide = first if block == 0 else 1, expand * channels
            if expand > 1:
                image.conv(wide, channels)
            image.conv(wide, wide, kernel=3, stride=stride, groups=wide)
            channels = image.conv(out, wide, added=stride == 1 and out == channels)
    channels = image.conv(1280, channels)
    image.copy(channels)
    return [*image.found, linear(setting.batch, 1000, channels, precision=setting.precision)]


@dataclass(frozen=True, slots=True)
class Yolo11:
    """YOLO11 of one scale, as its configuration in the Ultralytics repository describes it."""

    depth: float
    width: float
    most: int
    nested: bool  # whether all blocks are of the nested kind

    def __call__(self, setting: Setting) -> list[Operator]:
        image = Image(setting, setting.size, activated=True)
        wide = self._channels
        channels = image.conv(wide(64), 3, kernel=3, stride=2)
        channels = image.conv(wide(128), channels, kernel=3, stride=2)
        channels = self._block(image, wide(256), channels, share=0.25)
        channels = image.conv(wide(256), channels, kernel=3, stride=2)
        third = self._block(image, wide(512), channels, share=0.25)
        channels = image.conv(wide(512), third, kernel=3, stride=2)
        fourth = self._block(image, wide(512), channels, nested=True)
        channels = image.conv(wide(1024), fourth, kernel=3, stride=2)
        channels = self._block(image, wide(1024), channels, nested=True)
        half = image.conv(channels // 2, channels)
        for _ in range(3):
            image.copy(half)
        channels = image.conv(channels, 4 * half)
        fifth = self._attention(image, channels)
        at = image.edge
        joined = self._up(image, fifth, fourth)
        middle = self._block(image, wide(512), joined)
        joined = self._up(image, middle, third)
        fine = self._block(image, wide(256), joined)
        outputs = [(fine, image.edge)]
        channels = image.conv(wide(256), fine, kernel=3, stride=2)
        outputs.append((self._block(image, wide(512), channels + middle), image.edge))
        channels = image.conv(wide(512), outputs[-1][0], kernel=3, stride=2)
        outputs.append((self._block(image, wide(1024), channels + fifth, nested=True), at))
        for channels, edge in outputs:
            image.edge = edge
            self._detect(image, channels, first=fine)
        return image.found

    def _channels(self, number: int) -> int:
        return -(-int(min(number, self.most) * self.width) // 8) * 8

    def _block(
        self, image: Image, out: int, channels: int, *, nested: bool = False, share: float = 0.5
    ) -> int:
        inner, count = int(out * share), max(round(2 * self.depth), 1)
        image.conv(2 * inner, channels)
        for _ in range(count):
            if nested or self.nested:
                half = inner // 2
                image.conv(half, inner)
                image.conv(half, inner)
                for _ in range(2):
                    image.conv(half, half, kernel=3)
                    image.conv(half, half, kernel=3, added=True)
                image.conv(inner, 2 * half)
            else:
                image.conv(inner // 2, inner, kernel=3)
                image.conv(inner, inner // 2, kernel=3, added=True)
        return image.conv(out, (2 + count) * inner)

    def _attention(self, image: Image, channels: int) -> int:
        half, places = channels // 2, image.edge**2
        image.conv(2 * half, channels)
        for _ in range(max(round(2 * self.depth), 1)):
            image.conv(2 * half, half)
            heads = image.setting.batch * max(half // 64, 1)
            image.found.append(Attention(heads, places, places, 48))  # keys of 32, values of 64
            image.conv(half, half, kernel=3, groups=half)
            image.conv(half, half, added=True)
            image.conv(2 * half, half)
            image.conv(half, 2 * half, added=True)
        return image.conv(channels, 2 * half)

    def _up(self, image: Image, channels: int, beside: int) -> int:
        image.edge *= 2
        image.copy(channels)
        return channels + beside

    def _detect(self, image: Image, channels: int, *, first: int) -> None:
        boxes, classes = max(16, first // 4, 64), max(first, 80)
        image.conv(boxes, channels, kernel=3)
        image.conv(boxes, boxes, kernel=3)
        image.conv(64, boxes)
        image.conv(channels, channels, kernel=3, groups=channels)
        image.conv(classes, channels)
        image.conv(classes, classes, kernel=3, groups=classes)
        image.conv(classes, classes)
        image.conv(80, classes)


NETWORKS: dict[str, Callable[[Setting], list[Operator]]] = {
    "bert-base": lambda s: encoder(s, layers=12, hidden=768),
    "bert-large": lambda s: encoder(s, layers=24, hidden=1024),
    "vit-b16": lambda s: vision_transformer(s, layers=12, hidden=768),
    "vit-l16": lambda s: vision_transformer(s, layers=24, hidden=1024),
    "mlp-stack": lambda s: feed_forwards(s, layers=6, hidden=768),
    "resnet18": lambda s: residual_network(s, blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda s: residual_network(s, blocks=(3, 4, 6, 3), bottleneck=True),
    "resnet101": lambda s: residual_network(s, blocks=(3, 4, 23, 3), bottleneck=True),
    "mobilenet-v1": mobilenet_v1,
    "mobilenet-v2": mobilenet_v2,
    "yolo11n": Yolo11(0.5, 0.25, 1024, False),
    "yolo11s": Yolo11(0.5, 0.5, 1024, False),
    "yolo11m": Yolo11(0.5, 1.0, 512, True),
    "yolo11l": Yolo11(1.0, 1.0, 512, True),
    "yolo11x": Yolo11(1.0, 1.5, 512, True),
}
