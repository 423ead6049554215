"""Heads of attention that is written by hand are found, and removed exactly."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from tests.three_ways import (
    IN_ONNX,
    Feeds,
    all_exported,
    by_onnx,
    by_program,
    by_surgery,
    case_of,
    gap,
    inert,
    random_sets,
    relative_gap,
    single_units,
    tolerance,
    whole_sites,
)
from tests.tiny_models import Case, Kept
from tests.zoo import Family
from tests.zoo.by_hand import BY_HAND
from zipc.pruner.graph.as_traced import AsTraced
from zipc.pruner.graph.decompose import einsum, repeat, repeat_interleave
from zipc.pruner.graph.interpret import Executor
from zipc.pruner.graph.sites import find_sites
from zipc.pruner.graph.verify import verify

FOLLOWS = ("deberta",)  # of itself: its code says -1
by_hand = pytest.mark.parametrize("name", BY_HAND)


@functools.cache
def cases(name: str, dtype: torch.dtype = torch.float64) -> tuple[Case, Case]:
    """The module as it is written, and as a module that runs its graph; both with its sites."""
    written = case_of(BY_HAND[name], dtype)
    found = find_sites(written.program)
    module = AsTraced(written.module, written.program, found)
    structure = verify(module, written.program, found, written.example)
    executor = Executor(written.program, structure)
    traced = replace(written, module=module, structure=structure, executor=executor)
    return replace(written, structure=structure), traced


def trials(name: str, dtype: torch.dtype, *, most: int | None) -> list[tuple[Kept, Feeds]]:
    _, traced = cases(name, dtype)
    found: list[tuple[Kept, Feeds]] = []
    found += [(kept, traced.example) for _, _, kept in single_units(traced, most=most)]
    found += [(kept, traced.example) for _, kept in whole_sites(traced)]
    other = BY_HAND[name].example(batch=3, seed=1)
    other = {k: v.to(dtype) if v.is_floating_point() else v for k, v in other.items()}
    return found + [(kept, other) for kept in random_sets(traced, 4)]


@by_hand
def test_its_heads_are_found(name: str) -> None:
    written, traced = cases(name)
    heads = [s for s in traced.sites if s.kind == "heads"]
    units = {"grouped": 2}.get(name, 4)
    assert [s.units for s in heads] == [units] * (1 if name == "latents" else 2)
    assert all(s.removable for s in heads) == (name != "latents")  # nothing else reads the input
    found = case_of(BY_HAND[name]).sites
    assert (len(found) == len(traced.sites)) == (name in FOLLOWS)
    assert written.module is not traced.module


@by_hand
def test_they_are_removed_exactly(name: str) -> None:
    written, traced = cases(name)
    bound = tolerance(BY_HAND[name])
    for kept, feeds in trials(name, torch.float64, most=4):
        want = inert(written, kept, feeds)
        assert gap(by_surgery(traced, kept, feeds), want) < bound
        assert gap(by_program(traced, kept, feeds), want) < bound


@by_hand
def test_they_are_removed_in_onnx_runtime(name: str) -> None:
    written, traced = cases(name, torch.float32)
    graph = all_exported(traced, BY_HAND[name])
    assert "Einsum" not in graph.op_counts()
    for kept, feeds in trials(name, torch.float32, most=1):
        want = inert(written, kept, feeds)
        assert relative_gap(by_onnx(traced, graph, kept, feeds), want) < IN_ONNX


PRODUCTS = (
    "bhid,bhjd->bhij",
    "b i h d, b j h d -> b h i j",
    "bhij,bhjd->bihd",
    "ij,jk->ik",
    "bij,bjk->kib",
)
OTHERS = ("bi,bj->bij", "ii,ij->ij", "bij,bkj->b", "i,j->ij", "...ij,...jk->...ik", "ij,jk")


@pytest.mark.parametrize("equation", [*PRODUCTS, *OTHERS])
def test_an_einsum_is_a_product_or_left_as_it_is(equation: str) -> None:
    sizes = dict(zip("bhijkd", (2, 3, 4, 4, 5, 6), strict=True))
    names = equation.replace("...", "").replace(" ", "").partition("->")[0].split(",")
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn([sizes[n] for n in each], generator=generator) for each in names]
    found = einsum(equation, factors)
    assert (found is not NotImplemented) == (equation in PRODUCTS)
    if equation in PRODUCTS:
        torch.testing.assert_close(found, torch.einsum(equation, factors))


def test_repeats_are_what_torch_makes_of_them() -> None:
    x = torch.randn(2, 3, 1)
    for counts in ([1, 1, 1], [4, 1, 1], [1, 2, 5], [2, 1, 3, 1], [0, 1, 1]):
        assert torch.equal(repeat(x, counts), x.repeat(counts))
    for dim in (0, 1, -1):
        assert torch.equal(repeat_interleave(x, 3, dim), x.repeat_interleave(3, dim))
    assert repeat_interleave(x, 3) is NotImplemented


class Chosen(torch.nn.Module):
    """Truths, one of each channel, say which are kept; whole numbers scale others."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
        self.register_buffer("values", values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x).relu()
        if self.values.dtype == torch.bool:
            x = torch.where(self.values, x, -x)
        return self.down(x * self.values)


@pytest.mark.parametrize(("kind", "cut"), [(torch.bool, True), (torch.int64, False)])
def test_values_of_channels_are_cut_if_they_are_truths(kind: torch.dtype, *, cut: bool) -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return Chosen(torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).to(kind)).eval().requires_grad_(False)

    def example(*, batch: int = 2, seed: int = 0) -> Feeds:
        return {"x": torch.randn(batch, 6, generator=torch.Generator().manual_seed(seed))}

    family = Family("chosen", build, example, {"x": {0: "batch"}}, "rows")
    made = case_of(family, torch.float32)
    assert bool(made.sites) == cut
    graph = all_exported(made, family)
    for _, _, kept in single_units(made):
        assert gap(by_onnx(made, graph, kept, made.example), inert(made, kept, made.example)) < 1e-5
