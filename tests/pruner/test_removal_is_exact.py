"""Removing units for good equals hiding them from their consumers, in fp64, for every family."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_models import (
    FAMILIES,
    case,
    everything,
    first,
    random_kept,
    surgered,
    text,
    variant_of,
    zeroed,
)
from zipc.pruner.graph.interpret import Variant

EXACT = 1e-10  # every family computes in float64 from end to end
pytestmark = pytest.mark.xdist_group("encoders")
families = pytest.mark.parametrize("family", FAMILIES)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


@families
def test_every_unit_of_every_site_removed_equals_zeroed(family: str) -> None:
    made = case(family, torch.float64)
    dense = first(made.module(**made.example))
    assert dense.dtype == torch.float64
    for site in made.sites:
        noticed = 0.0
        for unit in range(site.units):
            kept = everything(made)
            kept[site.name].remove(unit)
            want = zeroed(made, kept, made.example)
            assert apart(first(surgered(made, kept)(**made.example)), want) < EXACT
            noticed = max(noticed, apart(dense, want))
        assert noticed > 1e-2, "removals that nobody notices prove nothing"


@families
def test_a_whole_site_removed_leaves_the_bias_of_its_consumer(family: str) -> None:
    made = case(family, torch.float64)
    for site in made.inner:
        kept = everything(made) | {site.name: []}
        module = surgered(made, kept)
        want = zeroed(made, kept, made.example)
        assert apart(first(module(**made.example)), want) < EXACT
        for consumer in site.consumers:
            before = made.module.get_submodule(consumer.module)
            after = module.get_submodule(consumer.module)
            torch.testing.assert_close(after.bias, before.bias)
            assert after.weight.numel() == 0
        assert sum(p.numel() for p in module.parameters()) < sum(
            p.numel() for p in made.module.parameters()
        )


@families
@pytest.mark.parametrize("seed", range(4))
def test_random_units_at_all_sites_agree_three_ways(family: str, seed: int) -> None:
    made = case(family, torch.float64)
    kept = random_kept(made, seed)
    feeds = text(family, batch=3, length=11, seed=seed)  # not the traced sizes
    want = zeroed(made, kept, feeds)
    with torch.no_grad():
        (run,), _ = made.executor.run(feeds, variant_of(made, kept))
    assert apart(first(surgered(made, kept)(**feeds)), want) < EXACT
    assert apart(run, want) < EXACT


@families
def test_everything_removed_still_runs(family: str) -> None:
    made = case(family, torch.float64)
    kept = everything(made) | {site.name: [] for site in made.inner}
    want = zeroed(made, kept, made.example)
    (run,), _ = made.executor.run(made.example, variant_of(made, kept))
    assert apart(first(surgered(made, kept)(**made.example)), want) < EXACT
    assert apart(run, want) < EXACT


@families
def test_the_dense_allocation_changes_nothing(family: str) -> None:
    made = case(family, torch.float64)
    dense = first(made.module(**made.example))
    assert apart(first(surgered(made, everything(made))(**made.example)), dense) < EXACT
    (run,), _ = made.executor.run(made.example, Variant())
    assert apart(run, dense) < EXACT
