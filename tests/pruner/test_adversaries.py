"""Where a naive tool is silently wrong: what is removed is exact, the rest is left alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from tests.three_ways import (
    AMPLIFIED,
    EXACT,
    IN_ONNX,
    Feeds,
    all_exported,
    by_onnx,
    by_program,
    case_of,
    double,
    feeds_of,
    gap,
    inert,
    other_feeds,
    prove_in_torch,
    random_sets,
    relative_gap,
    single_units,
    whole_sites,
)
from tests.tiny_models import Case, Kept, everything
from tests.zoo import Family
from tests.zoo.adversarial import ADVERSARIES, SOLVABLE
from tests.zoo.random_graphs import graphs
from zipc.core.errors import UnsupportedModel

pytestmark = pytest.mark.xdist_group("zoo")


def prove(made: Case, family: Family, *, seeds: int = 3) -> None:
    trials: list[tuple[Kept, Feeds]] = []
    trials += [(kept, made.example) for _, _, kept in single_units(made)]
    trials += [(kept, made.example) for _, kept in whole_sites(made)]
    trials += [(kept, other_feeds(family)) for kept in random_sets(made, seeds)]
    for kept, feeds in trials:
        prove_in_torch(made, kept, feeds)


def prove_onnx(family: Family, *, most: int | None = 2) -> None:
    made = case_of(family, torch.float32)
    graph = all_exported(made, family)
    trials: list[tuple[Kept, Feeds]] = []
    trials += [(kept, made.example) for _, _, kept in single_units(made, most=most)]
    trials += [(kept, made.example) for _, kept in whole_sites(made)]
    trials += [(kept, other_feeds(family, torch.float32)) for kept in random_sets(made, 2)]
    bound = max(IN_ONNX, AMPLIFIED * rounding(made, family))
    for kept, feeds in trials:
        want = inert(made, kept, feeds)
        assert relative_gap(by_onnx(made, graph, kept, feeds), want) < bound


def rounding(made: Case, family: Family) -> float:
    """How far the dense network in fp32 is from itself in fp64: some random ones amplify."""
    exact = case_of(family)
    want = inert(exact, everything(exact), feeds_of(family))
    got = inert(made, everything(made), feeds_of(family, torch.float32))
    return relative_gap(got, [w.float() for w in want])


@pytest.mark.parametrize("name", ADVERSARIES)
def test_whatever_is_removed_is_exact(name: str) -> None:
    prove(double(name), ADVERSARIES[name])


@pytest.mark.parametrize("name", [n for n in ADVERSARIES if n != "unknown-op"])
def test_whatever_is_removed_is_exact_in_onnx_runtime(name: str) -> None:
    prove_onnx(ADVERSARIES[name])


def test_an_operation_that_onnx_does_not_have_is_named() -> None:
    family = ADVERSARIES["unknown-op"]
    with pytest.raises(UnsupportedModel, match="unheard_of"):
        all_exported(case_of(family, torch.float32), family)


@pytest.mark.parametrize("name", sorted(SOLVABLE))
def test_a_careful_tool_finds_something_to_remove_at_the_trap(name: str) -> None:
    made = double(name)
    assert made.sites
    first = made.program.maps[0].module
    found = {m for s in made.sites for m in s.maps}
    assert first in found, [(e.path, e.reason) for e in made.structure.left_alone]


@pytest.mark.parametrize("name", ADVERSARIES)
def test_every_map_is_in_a_site_or_left_alone_with_a_reason(name: str) -> None:
    made = double(name)
    inside = {p.parameter.rpartition(".")[0] for s in made.sites for p in s.slices}
    outside = {entry.path: entry.reason for entry in made.structure.left_alone}
    assert {call.module for call in made.program.maps} <= inside | set(outside)
    assert all(outside.values())


# --- random graphs -------------------------------------------------------------------------------

random_graphs = settings(
    deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=True
)


@settings(random_graphs, max_examples=25)
@given(graphs())
def test_random_graphs_are_exact(family: Family) -> None:
    prove(case_of(family), family)


@settings(random_graphs, max_examples=6)
@given(graphs())
def test_random_graphs_are_exact_in_onnx_runtime(family: Family) -> None:
    prove_onnx(family, most=1)


@pytest.mark.slow
@settings(random_graphs, max_examples=300)
@given(graphs(max_steps=12))
def test_many_random_graphs_are_exact(family: Family) -> None:
    prove(case_of(family), family)
    prove_onnx(family)


@settings(random_graphs, max_examples=15)
@given(graphs())
def test_random_graphs_have_something_to_remove(family: Family) -> None:
    """Every one of them has a convolution whose width nothing holds: at least one site is found."""
    made = case_of(family)
    kept = everything(made)
    dense: list[Tensor] = inert(made, kept, feeds_of(family))
    assert made.sites or all(entry.reason for entry in made.structure.left_alone)
    assert gap(by_program(made, kept, feeds_of(family)), dense) < EXACT
