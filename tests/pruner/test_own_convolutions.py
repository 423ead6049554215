"""Convolutions of a class of the user's own, that pads its input, say: cut, never replaced."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.pruner.test_adversaries import prove, prove_onnx
from tests.three_ways import case_of
from tests.zoo import Family
from tests.zoo.values import images, ready


class PadsItself(nn.Conv2d):
    """Output as large as the input over the stride, whatever the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (s, _) = self.kernel_size, self.stride
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n in x.shape[2:]]
        pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, groups=self.groups)


class WithoutBias(nn.Conv2d):
    """It has no use for the bias that one in its place would need."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, self.stride, self.padding)


class Gained(nn.Conv2d):
    """A gain for every channel it gives."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Counting(nn.Conv2d):
    """It knows by another name how many channels it reads."""

    def __init__(self, read: int, given: int, kernel: int) -> None:
        super().__init__(read, given, kernel)
        self.expected = read

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.expected:
            raise ValueError("other channels than expected")
        return super().forward(x)


class Mobile(nn.Module):
    """A block of a mobile network: stem and depthwise convolutions pad themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = PadsItself(3, 6, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.expand = nn.Conv2d(6, 12, 1, bias=False)
        self.depthwise = PadsItself(12, 12, 3, stride=2, groups=12, bias=False)
        self.project = nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        x = self.project(F.silu(self.depthwise(F.silu(self.expand(x)))))
        logits: Tensor = self.head(F.relu(x).mean((2, 3)))
        return logits


class Separable(nn.Module):
    """A depthwise convolution between two of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = PadsItself(3, 6, 3), PadsItself(6, 5, 1)
        self.depthwise, self.head = PadsItself(6, 6, 3, groups=6), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(F.relu(self.depthwise(F.relu(self.first(x)))))
        logits: Tensor = self.head(F.relu(x).mean((2, 3)))
        return logits


class Chain(nn.Module):
    """`kind` twice between plain convolutions."""

    def __init__(self, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.own = kind(6, 7, 3)
        self.again = kind(7, 8, 3)
        self.last = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.own(F.relu(self.first(x))))))
        logits: Tensor = self.head(F.relu(self.last(x)).mean((2, 3)))
        return logits


KINDS = {kind.__name__: kind for kind in (PadsItself, WithoutBias, Gained, Counting)}


def family(name: str) -> Family:
    example = partial(images, size=8)
    whole = {"mobile": Mobile, "separable": Separable}
    made = whole[name] if name in whole else partial(Chain, KINDS[name])
    return Family(
        name, lambda: ready(made(), example()), example, {"x": {0: "batch"}}, modality="image"
    )


@pytest.mark.parametrize("name", ["mobile", "separable", *KINDS])
def test_they_are_cut_exactly(name: str) -> None:
    prove(case_of(family(name)), family(name))
    prove_onnx(family(name))


def test_widths_of_a_mobile_block_are_found() -> None:
    made = case_of(family("mobile"))
    assert {s.name for s in made.sites} == {"stem", "expand", "project"}
    held = {m for site in made.sites for m in site.maps}
    assert "depthwise" not in held  # channels run through it


@pytest.mark.parametrize("name", KINDS)
def test_what_they_read_stays_and_what_they_give_is_cut(name: str) -> None:
    """No bias can stand in there for inputs that are gone."""
    made = case_of(family(name))
    kept = {entry.path: entry.reason for entry in made.structure.left_alone}
    assert {s.name for s in made.sites} == {"again", "last"}
    assert "not to a plain linear map" in kept["first"]
    assert "not to a plain linear map" in kept["own"]


def test_a_depthwise_one_has_the_reason_of_what_reads_it() -> None:
    made = case_of(family("separable"))
    reasons = {entry.path: entry.reason for entry in made.structure.left_alone}
    assert {s.name for s in made.sites} == {"last"}
    assert "belongs to a PadsItself" in reasons["depthwise"]
    assert reasons["depthwise"] == reasons["first"]
