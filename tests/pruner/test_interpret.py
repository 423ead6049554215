"""The executor equals the module, from any starting point, for any pair of candidates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.tiny_models import (
    FAMILIES,
    Case,
    Kept,
    case,
    everything,
    first,
    random_kept,
    sliced,
    text,
    zeroed,
)
from zipc.pruner.graph.interpret import Variant

EXACT = 1e-10
pytestmark = pytest.mark.xdist_group("encoders")
families = pytest.mark.parametrize("family", FAMILIES)


def variant(made: Case, kept: Kept) -> Variant:
    tensors, constants = sliced(made, kept)
    widths = {n: len(k) for n, k in kept.items()}
    return Variant(tensors=tensors, constants=constants, widths=widths)


@dataclass(frozen=True)
class Held:
    """Weights that stand in for those of a map, as the search holds them."""

    weight: Tensor
    bias: Tensor | None
    on_seen: Callable[[Tensor], object] = lambda _: None
    numeric: str = "fp32"

    def seen(self, x: Tensor) -> Tensor:
        self.on_seen(x)
        return x


def searched(made: Case, kept: Kept) -> Variant:
    """A candidate as the search makes it: whole maps in place of tensors."""
    tensors, constants = sliced(made, kept)
    weights = made.weights | tensors
    maps = {}
    for site in made.sites:
        if not kept[site.name]:
            continue
        for path in site.maps:
            maps[path] = Held(weights[path + ".weight"], weights.get(path + ".bias"))
    others = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in maps}
    widths = {n: len(k) for n, k in kept.items()}
    return Variant(maps=maps, constants=constants, widths=widths, tensors=others)


@families
def test_the_dense_program_equals_the_module_at_other_sizes(family: str) -> None:
    made = case(family, torch.float64)
    for batch, length in ((1, 1), (1, 12), (4, 3)):
        feeds = text(family, batch=batch, length=length)
        (got,), _ = made.executor.run(feeds, Variant())
        torch.testing.assert_close(got, first(made.module(**feeds)), atol=EXACT, rtol=0)


@families
def test_a_run_resumed_where_two_candidates_part_equals_a_whole_run(family: str) -> None:
    """Also where the first one removed what the second one needs, as mask and biases are."""
    made = case(family, torch.float64)
    feeds = text(family, batch=2, length=5)
    sites = made.sites
    candidates = [everything(made), random_kept(made, 0), random_kept(made, 1)]
    candidates.append({s.name: [0, 1] if s.kind == "width" else [] for s in sites})
    candidates.append({s.name: [] if s.kind == "heads" else [0, 1] for s in sites})
    cuts = {s.name: made.executor.first_effect(s) for s in sites}
    for old, new in itertools.permutations(candidates, 2):
        for site in sites:
            start = cuts[site.name]
            base = {s.name: (new if cuts[s.name] < start else old)[s.name] for s in sites}
            _, saved = made.executor.run(feeds, variant(made, base), cuts=[start])
            if start not in saved:  # nothing at or after the cut was needed
                continue
            want = zeroed(made, new, feeds)
            (got,), _ = made.executor.run(
                feeds, searched(made, new), start=start, live=saved[start]
            )
            torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


@families
def test_nothing_before_the_first_effect_depends_on_a_site(family: str) -> None:
    made = case(family, torch.float64)
    feeds = text(family, batch=2, length=5)
    for site in made.sites:
        cut = made.executor.first_effect(site)
        kept = everything(made) | {site.name: [0]}
        _, dense = made.executor.run(feeds, Variant(), cuts=[cut])
        _, pruned = made.executor.run(feeds, searched(made, kept), cuts=[cut])
        for name, value in pruned[cut].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(dense[cut][name])), name


def test_a_removed_site_costs_nothing() -> None:
    """Maps that only a removed consumer read are not run."""
    made = case("bert")
    ran: list[str] = []
    kept = everything(made) | {made.sites[0].name: [], made.sites[3].name: []}
    made.executor.run(
        made.example, variant(made, kept), on_map=lambda call, _: ran.append(call.module)
    )
    gone = {*made.sites[0].producers, *made.sites[3].producers}
    gone |= {c.module for s in (made.sites[0], made.sites[3]) for c in s.consumers}
    assert not gone & set(ran)
    assert ran == [c.module for c in made.program.maps if c.module in set(ran)]


def test_every_call_of_a_shared_module_is_seen_and_replaced() -> None:
    made = case("albert")
    path = made.sites[1].producers[0]
    inputs: list[Tensor] = []
    weight, bias = made.weights[path + ".weight"], made.weights[path + ".bias"]
    held = Held(weight * 0, bias * 0, inputs.append)
    (got,), _ = made.executor.run(made.example, Variant(maps={path: held}))
    assert len(inputs) == 2
    tensors = {path + ".weight": weight * 0, path + ".bias": bias * 0}
    (want,), _ = made.executor.run(made.example, Variant(tensors=tensors))
    torch.testing.assert_close(got, want, atol=0, rtol=0)


def test_a_run_leaves_no_trace_in_the_executor_or_its_arguments() -> None:
    made = case("bert", torch.float64)
    feeds = text("bert")
    copies = {k: v.clone() for k, v in feeds.items()}
    (before,), _ = made.executor.run(feeds, Variant())
    (pooler,) = [c.node for c in made.program.maps if c.module == "pooler.dense"]
    _, saved = made.executor.run(feeds, Variant(), cuts=[made.executor.index(pooler)])
    live = next(iter(saved.values())) if saved else {}
    keys = set(live)
    made.executor.run(feeds, variant(made, random_kept(made, 1)))
    (after,), _ = made.executor.run(feeds, Variant())
    assert torch.equal(before, after)
    assert all(torch.equal(feeds[k], copies[k]) for k in feeds)
    assert set(live) == keys
