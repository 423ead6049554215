"""Cutting tensors equals an explicit loop over their indices, however many sites own them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zipc.core.types import Consumer, Index, Site, Slice
from zipc.pruner.graph.cuts import Cuts


def site(name: str, units: int, *slices: Slice) -> Site:
    return Site(name, "channels", units, slices, (Consumer("m", ()),), ("p",), "")


def units_of(outer: int, units: int, inner: int) -> Index:
    """Positions of each unit in a dimension laid out (outer, units, inner)."""
    return tuple(
        tuple((o * units + u) * inner + i for o in range(outer) for i in range(inner))
        for u in range(units)
    )


def loop(tensor: Tensor, gone: list[set[int]]) -> Tensor:
    """The entries none of whose indices is gone, in order."""
    left = [[i for i in range(n) if i not in g] for n, g in zip(tensor.shape, gone, strict=True)]
    made = torch.empty([len(kept) for kept in left], dtype=tensor.dtype)
    for place in torch.cartesian_prod(*[torch.arange(len(k)) for k in left]).view(-1, len(left)):
        source = tuple(kept[int(p)] for p, kept in zip(place, left, strict=True))
        made[tuple(place.tolist())] = tensor[source]
    return made


def removed(sites: list[Site], parameter: str, dim: int, kept: dict[str, list[int]]) -> set[int]:
    gone: set[int] = set()
    for held in sites:
        for piece in held.slices:
            if piece.parameter == parameter and piece.dim == dim and held.name in kept:
                for unit in range(held.units):
                    if unit not in kept[held.name]:
                        gone |= set(piece.index[unit])
    return gone


def test_units_are_cut_out_of_the_middle_of_a_dimension() -> None:
    """(outer, units, inner) against an explicit loop over flat indices."""
    outer, units, inner, kept = 2, 5, 3, [0, 3, 4]
    want = [(o * units + u) * inner + i for o in range(outer) for u in kept for i in range(inner)]
    cuts = Cuts([site("s", units, Slice("w", 1, units_of(outer, units, inner)))])
    assert cuts.stays("w", 1, 30, {"s": kept}).tolist() == want
    assert cuts.stays("w", 1, 30, {"s": []}).tolist() == []
    assert cuts.stays("w", 1, 30, {}).tolist() == list(range(30))
    assert cuts.stays("w", 0, 2, {"s": kept}).tolist() == [0, 1]
    weight = torch.arange(60.0).view(2, 30)
    assert torch.equal(cuts.cut(weight, "w", {"s": kept}), weight[:, want])
    assert torch.equal(cuts.cut(weight, "other", {"s": kept}), weight)


def test_sites_end_to_end_along_one_dimension_and_others_along_the_next() -> None:
    """As behind a concatenation: two sites own parts of the columns, a third owns the rows."""
    left = site("left", 3, Slice("w", 1, ((0,), (1,), (2,))))
    right = site("right", 2, Slice("w", 1, ((3, 4), (5, 6))))  # position 7 is nobody's
    rows = site("rows", 4, Slice("w", 0, units_of(1, 4, 1)), Slice("b", 0, units_of(1, 4, 1)))
    cuts = Cuts([left, right, rows])
    weight, bias = torch.arange(32.0).view(4, 8), torch.arange(4.0)
    kept = {"left": [0, 2], "right": [1], "rows": [1, 3]}
    want = torch.tensor([[8.0, 10, 13, 14, 15], [24, 26, 29, 30, 31]])
    assert torch.equal(cuts.cut(weight, "w", kept), want)
    assert torch.equal(cuts.cut(bias, "b", kept), torch.tensor([1.0, 3.0]))
    assert cuts.sites_of("w") == ["left", "right", "rows"]
    assert cuts.sites_of("b") == ["rows"]
    assert cuts.sites_of("other") == []
    assert cuts.shape("w", (4, 8), {"left": 2, "right": 1, "rows": 2}) == [2, 5]
    assert cuts.shape("w", (4, 8), {"rows": 1}) == [1, 8]


def test_one_site_may_own_rows_and_columns_of_a_tensor() -> None:
    both = site("both", 3, Slice("w", 0, units_of(1, 3, 1)), Slice("w", 1, units_of(1, 3, 1)))
    weight = torch.arange(9.0).view(3, 3)
    cut = Cuts([both]).cut(weight, "w", {"both": [0, 2]})
    assert torch.equal(cut, torch.tensor([[0.0, 2.0], [6.0, 8.0]]))
    assert Cuts([both]).sites_of("w") == ["both"]


def test_factors_of_one_dimension_are_cut_together() -> None:
    """A grid of 2 x 3 positions whose rows are one site and whose columns are another."""
    rows = site("rows", 2, Slice("w", 0, ((0, 1, 2), (3, 4, 5))))
    columns = site("columns", 3, Slice("w", 0, ((0, 3), (1, 4), (2, 5))))
    cuts = Cuts([rows, columns])
    assert cuts.stays("w", 0, 6, {"rows": [1], "columns": [0, 2]}).tolist() == [3, 5]
    assert cuts.shape("w", [6], {"rows": 1, "columns": 2}) == [2]


@st.composite
def problems(draw: Any) -> tuple[list[Site], dict[str, list[int]], list[int]]:
    """Up to three sites that each own a contiguous or strided part of either dimension."""
    shape = [0, 0]
    sites: list[list[Any]] = []
    for number in range(draw(st.integers(1, 4))):
        units = draw(st.integers(1, 4))
        slices = []
        for dim in draw(st.lists(st.integers(0, 1), max_size=2, unique=True)):
            outer, inner = draw(st.integers(1, 2)), draw(st.integers(1, 2))
            shape[dim] += draw(st.integers(0, 1))  # a position that is nobody's
            index = units_of(outer, units, inner)
            slices.append(Slice("w", dim, tuple(tuple(p + shape[dim] for p in u) for u in index)))
            shape[dim] += outer * units * inner
        sites.append([f"site{number}", units, slices])
    made = [site(name, units, *slices) for name, units, slices in sites]
    kept = {
        s.name: sorted(draw(st.sets(st.integers(0, s.units - 1))))
        for s in made
        if draw(st.booleans())
    }
    return made, kept, [max(1, n) for n in shape]


@settings(max_examples=150, deadline=None)
@given(problems())
def test_any_sites_cut_like_the_loop(
    problem: tuple[list[Site], dict[str, list[int]], list[int]],
) -> None:
    sites, kept, shape = problem
    tensor = torch.arange(float(shape[0] * shape[1])).view(shape)
    gone = [removed(sites, "w", dim, kept) for dim in range(2)]
    cuts = Cuts(sites)
    cut = cuts.cut(tensor, "w", kept)
    want = loop(tensor, gone)
    assert torch.equal(cut, want)
    widths = {name: len(units) for name, units in kept.items()}
    assert cuts.shape("w", shape, widths) == list(want.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_cut_keeps_dtype_and_leaves_the_tensor_as_it_was(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).to(dtype)
    before = tensor.clone()
    cut = Cuts([site("s", 3, Slice("w", 1, units_of(1, 3, 1)))]).cut(tensor, "w", {"s": [2]})
    assert cut.dtype == dtype
    assert torch.equal(tensor, before)
    assert torch.equal(cut, before[:, 2:])
