"""2:4 weights of maps: of the pattern at any level, fitted to their inputs, and kept by repair."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tiny_models import Case, randomise_, traced
from zipc.core.types import Allocation, Level
from zipc.numerics.int8 import DYNAMIC, STATIC
from zipc.numerics.pattern import conforms
from zipc.numerics.sparsity import largest
from zipc.pruner.compensate.propagate import propagate
from zipc.pruner.evidence import collect
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.graph.trace import MapCall
from zipc.pruner.ladder import sweep_site
from zipc.pruner.levels import Levels
from zipc.pruner.maps import matrices
from zipc.pruner.sparse import halved, refusal, to_pattern
from zipc.pruner.states import MapState, variant_of

LINEAR = MapCall("n", "m", "m.weight", "m.bias", "x")


class Blocks(nn.Module):
    """Two residual blocks on embeddings; the second has no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 32)
        self.up = nn.ModuleList(nn.Linear(32, 64, bias=i == 0) for i in range(2))
        self.down = nn.ModuleList(nn.Linear(64, 32, bias=i == 0) for i in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.gelu(up(x)))
        return x


class Chain(nn.Module):
    """Convolutions whose channels are cut on both sides, and one on three colours."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 32, 3, padding=1)
        self.third = nn.Conv2d(32, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.first, self.second, self.third):
            x = F.relu(conv(x))
        return self.last(x)


def tokens() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(60, (8, 16), generator=generator)} for _ in range(6)]


def images() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(4)]


@functools.cache
def made(network: type[nn.Module]) -> tuple[Case, Levels, list[dict[str, Tensor]]]:
    module = network().eval().requires_grad_(False)
    randomise_(module)
    data = tokens() if network is Blocks else images()
    dynamic = {} if network is Chain else None
    case = traced(module, data[0], dynamic=dynamic)
    stats = collect(case.executor, data, modules=[m for s in case.sites for m in s.maps])
    sweeps = {s.name: sweep_site(s, case.weights, stats, case.calls) for s in case.sites}
    sites = {s.name: s for s in case.sites}
    return case, Levels(sites, case.calls, case.weights, stats, sweeps), data


def sparse(case: Case, width: int, numeric: str = "fp32") -> Allocation:
    return Allocation({s.name: Level(width, numeric, "2:4") for s in case.sites}, 0.0, 0.0)


def is_sparse(state: MapState, call: MapCall) -> bool:
    found = conforms(state.weight.numpy(), axis=call.in_dim)
    assert found == (state.pattern == "2:4")
    if state.integer is not None:
        assert bool(((state.integer.values == 0) == (matrices(call, state.weight)[0] == 0)).all())
    return found


def lost(case: Case, variant: Variant, data: list[dict[str, Tensor]]) -> float:
    pairs = [[case.executor.run(f, v)[0][0] for v in (Variant(), variant)] for f in data]
    return sum(float((dense - small).square().sum()) for dense, small in pairs)


@pytest.mark.parametrize(
    ("shape", "integer", "said"),
    [
        ((8, 16), False, None),
        ((12, 16), False, "12 output channels"),
        ((8, 24), False, "24 input channels"),
        ((32, 48), True, "48 input channels are no multiple of 32"),
        ((32, 64), True, None),
    ],
)
def test_sparse_kernels_take_what_is_aligned(
    shape: tuple[int, int], integer: bool, said: str | None
) -> None:
    found = refusal(LINEAR, shape, integer=integer)
    assert found is None if said is None else said in str(found)


def test_transposed_convolutions_stay_dense() -> None:
    call = MapCall("n", "m", "w", None, "x", 1, 0, 1, 1, True, True)
    assert "transposed" in str(refusal(call, (32, 32, 1, 1), integer=False))


def test_a_weight_halved_for_its_price_has_the_pattern() -> None:
    assert conforms(halved(LINEAR, torch.ones(8, 16)).numpy(), axis=1)
    conv = MapCall("n", "m", "w", None, "x", kernel=9, convolution=True)
    assert conforms(halved(conv, torch.ones(8, 16, 3, 3)).numpy(), axis=1)


@pytest.mark.parametrize("biased", [True, False])
def test_the_fit_beats_the_mask_alone_and_a_bias_keeps_the_mean(biased: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 32, generator=generator) @ torch.randn(32, 32, generator=generator) + 1
    W = torch.randn(16, 32, generator=generator)
    bias = torch.zeros(16) if biased else None
    gram, total = (x.T @ x).double()[None], x.sum(0).double()[None]
    V, shift = to_pattern(LINEAR, W, bias, gram=gram, total=total, count=len(x))
    masked = W * largest(W.square(), kept=2, of=4)
    gap = x @ (W - V).T - (0 if shift is None else shift)
    assert conforms(V.numpy(), axis=1)
    assert float(gap.square().sum()) < 0.6 * float((x @ (W - masked).T).square().sum())
    assert (shift is not None) == biased
    if biased:
        assert float(gap.mean(0).abs().max()) < 1e-3


@pytest.mark.parametrize("network", [Blocks, Chain])
@pytest.mark.parametrize("width", [32, 16])
def test_every_map_that_can_is_sparse_at_a_sparse_level(
    network: type[nn.Module], width: int
) -> None:
    case, levels, _ = made(network)
    states = levels.states(sparse(case, width))
    found = {m: is_sparse(s, case.calls[m]) for m, s in states.maps.items()}
    assert found == {m: m != "first" for m in found}  # three colours are no four channels
    dense = levels.states(Allocation({s.name: Level(width) for s in case.sites}, 0.0, 0.0))
    assert not any(is_sparse(s, case.calls[m]) for m, s in dense.maps.items())


def test_maps_whose_width_does_not_suit_stay_as_they_are() -> None:
    case, levels, _ = made(Blocks)
    states = levels.states(sparse(case, 24))
    found = {m: is_sparse(s, case.calls[m]) for m, s in states.maps.items()}
    assert found == {"up.0": True, "up.1": True, "down.0": False, "down.1": False}


def test_the_rows_that_are_left_are_those_of_the_whole_weight() -> None:
    """Producers are brought to the pattern once for all widths."""
    case, levels, _ = made(Blocks)
    site = case.sites[0]
    whole, cut = (levels.states(sparse(case, w)).maps["up.0"].weight for w in (64, 32))
    torch.testing.assert_close(cut, whole[list(levels.kept(site.name, 32))])


@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC])
@pytest.mark.parametrize("feedback", [False, True])
def test_zeros_survive_rounding(numeric: str, feedback: bool) -> None:
    case, levels, _ = made(Blocks)
    states = levels.states(sparse(case, 32, numeric), feedback=feedback)
    assert all(s.integer is not None for s in states.maps.values())
    assert all(is_sparse(s, case.calls[m]) for m, s in states.maps.items())


@pytest.mark.parametrize("network", [Blocks, Chain])
@pytest.mark.parametrize("width", [32, 16])
def test_the_repair_keeps_the_pattern_and_comes_nearer(
    network: type[nn.Module], width: int
) -> None:
    case, levels, data = made(network)
    allocation = sparse(case, width)
    states = propagate(case.executor, levels, allocation, data)
    assert all(is_sparse(s, case.calls[m]) == (m != "first") for m, s in states.maps.items())
    before = lost(case, levels.variant(allocation), data)
    assert lost(case, variant_of(allocation, states), data) < 0.83 * before


def test_a_sparse_and_rounded_model_is_repaired_too() -> None:
    case, levels, data = made(Blocks)
    allocation = sparse(case, 32, STATIC)
    states = propagate(case.executor, levels, allocation, data)
    assert all(is_sparse(s, case.calls[m]) for m, s in states.maps.items())
    assert all(s.numeric == STATIC for s in states.maps.values())
    before = lost(case, levels.variant(allocation), data)
    assert lost(case, variant_of(allocation, states), data) < 0.95 * before
