"""Random convolutional networks, drawn by hypothesis as a list of steps that shrinks well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.zoo import Family
from tests.zoo.values import images, ready
from tests.zoo.vision import SqueezeExcite, conv_norm

SIZE = 8
MOST = 24  # channels: a longer concatenation becomes a convolution
# simplest first: hypothesis shrinks towards it
KINDS = (
    "conv",
    "add",
    "cat",
    "split",
    "grouped",
    "depthwise",
    "norm",
    "pool",
    "squeeze-excite",
    "multiply",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One operation on earlier values; any numbers are legal, they are taken modulo what exists."""

    kind: str
    source: int = 0  # counted from the newest value
    other: int = 0
    width: int = 2
    stride: int = 1
    flatten: bool = False  # how a head reads the value, if nothing else does


def graphs(*, max_steps: int = 8) -> st.SearchStrategy[Family]:
    """Families of one random network each, with residuals, splits and several readers."""
    step = st.builds(
        Step,
        kind=st.sampled_from(KINDS),
        source=st.integers(0, 5),
        other=st.integers(0, 5),
        width=st.integers(2, 8),
        stride=st.integers(1, 2),
        flatten=st.booleans(),
    )
    return st.lists(step, min_size=1, max_size=max_steps).map(lambda steps: family(*steps))


def family(*steps: Step) -> Family:
    """The network of these steps; the repr of `build` shows them."""
    example = partial(images, size=SIZE)
    return Family("random", partial(_build, steps), example, {"x": {0: "batch"}}, modality="image")


def _build(steps: tuple[Step, ...]) -> nn.Module:
    return ready(RandomNet(steps), images(size=SIZE))


class RandomNet(nn.Module):
    """Every step appends a value, or two; linear heads read all that no step has read."""

    def __init__(self, steps: Sequence[Step], *, classes: int = 3) -> None:
        super().__init__()
        self.stem = conv_norm(3, 4, 3, nn.ReLU())
        self.steps = nn.ModuleList()
        self.sources: list[list[int]] = []
        shapes = [(4, SIZE)]  # channels and size of every value
        flatten = {0: False}  # values that nobody has read -> does a head read every position
        for step in steps:
            module, sources, made = _plan(step, shapes)
            self.steps.append(module)
            self.sources.append(sources)
            for source in sources:
                flatten.pop(source, None)
            for shape in made:
                flatten[len(shapes)] = step.flatten
                shapes.append(shape)
        self.flatten = flatten
        self.heads = nn.ModuleList(
            nn.Linear(shapes[v][0] * (shapes[v][1] ** 2 if whole else 1), classes)
            for v, whole in flatten.items()
        )

    def forward(self, x: Tensor) -> Tensor:
        values: list[Tensor] = [self.stem(x)]
        for module, sources in zip(self.steps, self.sources, strict=True):
            made = module(*(values[s] for s in sources))
            values.extend(made if isinstance(made, tuple) else (made,))
        read = [
            head(values[v].flatten(1) if whole else values[v].mean((2, 3)))
            for head, (v, whole) in zip(self.heads, self.flatten.items(), strict=True)
        ]
        return torch.stack(read).sum(0)


class Joined(nn.Module):
    """Add, or multiply by a gate; `project` brings the second value to the shape of the first."""

    def __init__(self, project: nn.Module, *, gate: bool) -> None:
        super().__init__()
        self.project = project
        self.gate = gate

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        b = self.project(b)
        return a * torch.sigmoid(b) if self.gate else a + b


class Concatenated(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)


class Split(nn.Module):
    """Equal halves by chunk, others by a list of sizes."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.sizes = (first, second)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.sizes[0] == self.sizes[1]:
            return x.chunk(2, dim=1)
        return x.split(self.sizes, dim=1)


Shape = tuple[int, int]


def _plan(step: Step, shapes: list[Shape]) -> tuple[nn.Module, list[int], list[Shape]]:
    """The module of a step, the values it reads, and the shapes of those it makes.

    A step that is impossible where it stands (one channel cannot be split) is a convolution.
    """
    newest = len(shapes) - 1
    a = newest - step.source % len(shapes)
    b = newest - step.other % len(shapes)
    channels, size = shapes[a]
    smaller = (size - 1) // step.stride + 1
    match step.kind:
        case "add" | "multiply":
            if shapes[b][1] < size:
                a, b = b, a
            wanted, (width, height) = shapes[a], shapes[b]
            project: nn.Module = nn.Identity()
            if a == b or shapes[a] != shapes[b]:
                act, stride = nn.Identity(), height // wanted[1]
                project = conv_norm(width, wanted[0], 3, act, stride=stride)
            return Joined(project, gate=step.kind == "multiply"), [a, b], [wanted]
        case "cat":
            fitting = [v for v in reversed(range(len(shapes))) if shapes[v][1] == size]
            b = fitting[step.other % len(fitting)]
            together = channels + shapes[b][0]
            if together <= MOST:
                return Concatenated(), [a, b], [(together, size)]
        case "split" if channels > 1:
            first = 1 + step.width % (channels - 1)
            return Split(first, channels - first), [a], [(first, size), (channels - first, size)]
        case "grouped" if channels > 1:
            groups = next(g for g in range(2, channels + 1) if channels % g == 0)
            width = groups * max(1, step.width // groups)
            conv = conv_norm(channels, width, 3, nn.ReLU(), stride=step.stride, groups=groups)
            return conv, [a], [(width, smaller)]
        case "depthwise":
            conv = conv_norm(channels, channels, 3, nn.ReLU6(), stride=step.stride, groups=channels)
            return conv, [a], [(channels, smaller)]
        case "norm":
            return nn.Sequential(nn.BatchNorm2d(channels), nn.SiLU()), [a], [(channels, size)]
        case "pool" if size > 1:
            kind = nn.MaxPool2d if step.stride == 1 else nn.AvgPool2d
            return kind(2), [a], [(channels, size // 2)]
        case "squeeze-excite":
            return SqueezeExcite(channels, step.width), [a], [(channels, size)]
    conv = conv_norm(channels, step.width, 3, nn.ReLU(), stride=step.stride)
    return conv, [a], [(step.width, smaller)]
