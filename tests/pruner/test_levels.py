"""Levels: nested units, repaired weights, rounded weights, and the cache that holds them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny_models import FAMILIES, Case, case, first, surgered, text
from zipc.core.types import Allocation, Consumer, Level, Site
from zipc.numerics.int4 import INT4
from zipc.numerics.int8 import DYNAMIC, STATIC
from zipc.pruner.evidence import InputStats, collect
from zipc.pruner.ladder import sweep_site, widths_of
from zipc.pruner.levels import Levels
from zipc.pruner.obs import Sweep
from zipc.pruner.states import MapState, States

FAMILY_NAMES = ["bert", "bert-classifier", "distilbert", "albert", "mpnet"]
pytestmark = pytest.mark.xdist_group("encoders")
families = pytest.mark.parametrize("family", FAMILY_NAMES)


@functools.cache
def evidence(family: str) -> dict[str, InputStats]:
    made = case(family)
    modules = {m for s in made.sites for m in s.maps}
    return collect(made.executor, data(family), modules=sorted(modules))


def data(family: str) -> list[dict[str, Tensor]]:
    return [text(family, batch=8, length=24, seed=s) for s in range(6)]


@functools.cache
def sweeps(family: str) -> dict[str, Sweep]:
    made = case(family)
    return {s.name: sweep_site(s, made.weights, evidence(family), made.calls) for s in made.sites}


def levels(family: str, **options: object) -> Levels:
    made = case(family)
    sites = {s.name: s for s in made.sites}
    return Levels(  # type: ignore[arg-type]
        sites, made.calls, made.weights, evidence(family), sweeps(family), **options
    )


def states(held: Levels, site: str, level: Level, *, feedback: bool = False) -> States:
    """All weights with one site at a level, the others dense."""
    return held.states(Allocation({site: level}, 0, 0), feedback=feedback)


def maps_of(site: Site) -> set[str]:
    return set(site.maps)


def inputs(made: Case, module: str, batches: list[dict[str, Tensor]]) -> Tensor:
    rows: list[Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        rows.append(x[feeds["attention_mask"].bool()] if x.dim() == 3 else x)

    handle = made.module.get_submodule(module).register_forward_pre_hook(keep)
    for feeds in batches:
        made.module(**feeds)
    handle.remove()
    return torch.cat(rows)


def output_error(state: MapState, made: Case, module: str, keep: Tensor, x: Tensor) -> float:
    linear = made.module.get_submodule(module)
    got = applied(state, x[:, keep])
    return float((got - linear(x)).double().square().sum())


def columns(consumer: Consumer, units: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(consumer.columns(units)), dtype=torch.long)


def applied(state: MapState, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(state.seen(x), state.weight, state.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_units_are_nested_in_width(family: str) -> None:
    made = case(family)
    held = levels(family) if family in FAMILY_NAMES else None
    for site in made.sites:
        assert widths_of(site, step=32)[0] == site.least
        assert widths_of(site, step=32)[-1] == site.units
        if held is None:
            continue
        assert held.kept(site.name, 0) == ()
        assert held.kept(site.name, site.units) == tuple(range(site.units))
        for width in range(site.units):
            assert len(held.kept(site.name, width)) == width
            assert set(held.kept(site.name, width)) < set(held.kept(site.name, width + 1))


@families
def test_refitted_weights_beat_sliced_ones_and_are_the_least_squares_ones(family: str) -> None:
    made = case(family)
    repaired, plain = levels(family), levels(family, compensator="none")
    for site in made.sites:
        for width in sorted({1, site.units // 2, site.units - 1}):
            for consumer in site.consumers:
                path = consumer.module
                keep = columns(consumer, repaired.kept(site.name, width))
                x = inputs(made, path, data(family))
                errors = [
                    output_error(
                        states(held, site.name, Level(width)).maps[path], made, path, keep, x
                    )
                    for held in (repaired, plain)
                ]
                assert errors[0] < errors[1]
                ones = np.ones((len(x), 1))
                kept = np.hstack([x[:, keep].double().numpy(), ones])
                target = made.module.get_submodule(path)(x).double().numpy()
                best = np.linalg.lstsq(kept, target, rcond=None)[0]
                least = float(((kept @ best - target) ** 2).sum())
                assert errors[0] <= least * 1.05 + 1e-6 * float((target**2).sum())


@families
def test_the_error_curve_of_the_ladder_is_what_the_weights_do(family: str) -> None:
    made = case(family)
    held = levels(family)
    for site in made.sites:
        if len(site.consumers) != 1:
            continue
        (consumer,) = site.consumers
        x = inputs(made, consumer.module, data(family))
        linear = made.module.get_submodule(consumer.module)
        dense = linear(x).double()
        energy = float((dense - dense.mean(0)).square().sum())
        curve = sweeps(family)[site.name].errors  # after 0, 1, ..., all removals
        for width in (1, site.units // 2, site.units - 1):
            keep = columns(consumer, held.kept(site.name, width))
            state = states(held, site.name, Level(width)).maps[consumer.module]
            error = output_error(state, made, consumer.module, keep, x) / energy
            assert error == pytest.approx(curve[site.units - width], rel=0.02, abs=2e-4)


@families
def test_a_removed_site_gives_the_mean_output(family: str) -> None:
    made = case(family)
    held = levels(family)
    for site in made.sites:
        state = states(held, site.name, Level(0))
        assert not state.maps
        for consumer in site.consumers:
            x = inputs(made, consumer.module, data(family))
            mean = made.module.get_submodule(consumer.module)(x).mean(0)
            torch.testing.assert_close(state.constants[consumer.module], mean, atol=1e-4, rtol=1e-4)


@families
def test_the_dense_level_is_the_dense_model(family: str) -> None:
    made = case(family)
    allocation = Allocation({s.name: Level(s.units) for s in made.sites}, 0, 0)
    (got,), _ = made.executor.run(made.example, levels(family).variant(allocation))
    torch.testing.assert_close(got, first(made.module(**made.example)), atol=1e-5, rtol=1e-5)


@families
def test_unrepaired_variants_equal_surgery(family: str) -> None:
    made = case(family)
    held = levels(family, compensator="none")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        widths = {s.name: int(rng.integers(1, s.units + 1)) for s in made.sites}
        kept = {n: list(held.kept(n, w)) for n, w in widths.items()}
        allocation = Allocation({n: Level(w) for n, w in widths.items()}, 0, 0)
        (got,), _ = made.executor.run(made.example, held.variant(allocation))
        want = first(surgered(made, kept)(**made.example))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@families
@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC, INT4])
def test_error_feedback_lowers_the_output_error_of_rounding(family: str, numeric: str) -> None:
    """Summed over maps: the inputs are what calibration saw, the weights are kept at 15 steps."""
    made = case(family)
    held = levels(family, weight_limit=7)
    totals = {False: 0.0, True: 0.0}
    for site in made.sites:
        level = Level(site.units, numeric)
        for feedback in totals:
            state = states(held, site.name, level, feedback=feedback)
            assert set(state.maps) == maps_of(site)
            for path, linear in state.maps.items():
                x = inputs(made, path, data(family))
                weight = made.weights[path + ".weight"]
                totals[feedback] += float(((linear.weight - weight) @ x.T).square().sum())
    assert totals[True] < 0.95 * totals[False]


@families
def test_rounded_levels_are_close_to_fp32_ones_of_the_same_width(family: str) -> None:
    made = case(family)
    held = levels(family)
    for site in made.sites:
        width = max(1, site.units // 2)
        plain = states(held, site.name, Level(width))
        assert set(plain.maps) == maps_of(site)
        for numeric, bound in ((DYNAMIC, 0.05), (STATIC, 0.05), (INT4, 0.3)):
            rounded = states(held, site.name, Level(width, numeric))
            assert rounded.maps.keys() == plain.maps.keys()
            assert rounded.tensors.keys() == plain.tensors.keys()
            for path, state in rounded.maps.items():
                other = plain.maps[path]
                assert state.integer is not None
                assert (state.activation is not None) == (numeric == STATIC)
                gap = float((state.weight - other.weight).abs().max())
                assert gap <= float(state.integer.scale.max()) * 0.51
                x = evidence(family)[path].sample[:64]
                if x.shape[1] == state.weight.shape[1]:
                    want = applied(other, x)
                    gap = float((applied(state, x) - want).norm() / want.norm())
                    assert gap < bound
                    assert torch.equal(state.seen(x), x) == (numeric == INT4)


def test_maps_that_read_the_same_share_one_calibrated_range() -> None:
    """Their input is then rounded once, which is also how a site is priced."""
    made = case("bert")
    site = made.sites[0]
    full = states(levels("bert"), site.name, Level(site.units, STATIC))
    ranges = {full.maps[m].activation for m in site.producers}
    assert len(site.producers) == 3
    assert len(ranges) == 1
    assert ranges.isdisjoint({full.maps[site.consumers[0].module].activation})


def test_weights_are_made_once_and_the_cache_stays_within_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = case("bert")
    held = levels("bert")
    site = made.sites[1]
    (path,) = site.producers
    level = ((site.name, Level(5)),)
    assert held.map_state(path, level) is held.map_state(path, level)
    assert held.map_state(path, level) is not held.map_state(path, level, feedback=True)
    one = size(held.map_state(path, level))
    monkeypatch.setattr("zipc.pruner.levels.CACHE_BYTES", 3 * one)
    monkeypatch.setattr("zipc.pruner.levels.CACHE_MODELS", 0)
    small = levels("bert")
    for width in range(site.units + 1):
        states(small, site.name, Level(width))
        assert small._held <= 3 * one or len(small._cache) == 1
        assert small._held == sum(map(size, small._cache.values()))
    assert small._cache


def size(held: MapState | Tensor) -> int:
    """Bytes of the weights that the cache counts; biases and scales are small beside them."""
    return (held.weight if isinstance(held, MapState) else held).nbytes


def test_widths_are_on_the_grid_and_finer_for_narrow_sites() -> None:
    site = case("bert").sites[1]
    wide = type(site)(
        site.name, "ffn", 1536, site.slices, site.consumers, site.producers, site.signature
    )
    assert widths_of(wide, step=32) == [*range(0, 1536, 32), 1536]
    narrow = type(site)(
        site.name, "ffn", 100, site.slices, site.consumers, site.producers, site.signature
    )
    assert widths_of(narrow, step=32) == [*range(0, 100, 8), 100]
    assert widths_of(site, step=32) == list(range(13))
