"""Channels evened out at INT8 levels: outliers cost little, and all else is what it was."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.three_ways import LIMITS, Feeds, feeds_of, relative_gap, run_onnx, single
from tests.tiny_models import Case, traced
from tests.zoo import ZOO
from zipc import build
from zipc.core.types import Allocation, Level
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.onnx_export import export_dense
from zipc.exporters.specialise import specialise
from zipc.numerics.int8 import DYNAMIC, STATIC
from zipc.numerics.smooth import of_channels
from zipc.pruner.allocate.scorer import Scorer
from zipc.pruner.compensate.propagate import propagate
from zipc.pruner.evidence import InputStats, collect
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.graph.passages import passages
from zipc.pruner.graph.sites import sizes_at
from zipc.pruner.ladder import sweep_site
from zipc.pruner.levels import Levels
from zipc.pruner.obs import Sweep
from zipc.pruner.states import States, variant_of

pytestmark = pytest.mark.xdist_group("zoo")
families = pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "albert"])
OUTLIER = 60.0
SAME = 5e-2  # ties in rounding that fall the other way


@functools.cache
def uneven(name: str) -> tuple[Case, OnnxGraph]:
    """A network of the zoo with outliers in what its consumers read: the same function."""
    made, _ = single(name)
    module = copy.deepcopy(made.module)
    state = module.state_dict()
    for passage in passages(made.program, made.sites):
        (named, at), *_ = passage.tensors.items()
        read = torch.tensor(
            sorted({row for rows in passage.readers.values() for row in rows} - {-1})
        )
        factors = torch.ones(state[named].shape[at])
        factors[read[::5]] = 1 / OUTLIER
        for named, at in passage.tensors.items():
            vector = state[named].dim() == 1
            state[named].div_(factors if vector else factors.unsqueeze(1 - at))
        for reader, rows in passage.readers.items():
            call = made.calls[reader]
            columns = of_channels(factors, torch.tensor(rows)).unsqueeze(1 - call.in_dim)
            state[call.weight].mul_(columns)
    family = ZOO[name]
    other = traced(module, made.example, dynamic=family.dynamic, limits=LIMITS, outputs=None)
    graph = export_dense(
        other.program.exported,
        other.example,
        outputs=[(i, f"result_{i}") for i in range(len(other.program.outputs))],
        dynamic=family.dynamic,
    )
    return other, graph


def data(name: str) -> list[Feeds]:
    return [feeds_of(ZOO[name], torch.float32, batch=6, seed=s) for s in range(4)]


@functools.cache
def evidence(name: str) -> tuple[dict[str, InputStats], dict[str, Sweep]]:
    made, _ = uneven(name)
    stats = collect(made.executor, data(name), modules=[c.module for c in made.program.maps])
    return stats, {s.name: sweep_site(s, made.weights, stats, made.calls) for s in made.sites}


def levels(name: str, *, even: bool) -> Levels:
    made, _ = uneven(name)
    sites = {s.name: s for s in made.sites}
    through = passages(made.program, made.sites) if even else []
    return Levels(sites, made.calls, made.weights, *evidence(name), passages=through)


def allocation(made: Case, numeric: str, share: float = 1.0) -> Allocation:
    """Every site but residual widths, at a share of its units."""
    picked = {s.name: Level(max(1, round(share * s.units)), numeric) for s in made.inner}
    return Allocation(picked, 0.0, 0.0)


def error(name: str, at: Allocation, states: States, seed: int = 9) -> float:
    made, _ = uneven(name)
    feeds = feeds_of(ZOO[name], torch.float32, batch=6, seed=seed)
    want, _ = made.executor.run(feeds, Variant())
    got, _ = made.executor.run(feeds, variant_of(at, states))
    return relative_gap(got[:1], want[:1])


@families
def test_outliers_cost_little_on_rows_that_were_not_calibrated_on(name: str) -> None:
    at = allocation(uneven(name)[0], STATIC)
    errors = {e: error(name, at, levels(name, even=e).states(at)) for e in (False, True)}
    assert errors[True] < 0.5 * errors[False]


@families
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_repair_goes_with_it_at_every_width(name: str, share: float) -> None:
    made, _ = uneven(name)
    at = allocation(made, STATIC, share)
    floats = allocation(made, "fp32", share)
    states = {
        e: propagate(made.executor, levels(name, even=e), at, data(name)) for e in (False, True)
    }
    exact = propagate(made.executor, levels(name, even=True), floats, data(name))
    lost = {e: error(name, at, found) - error(name, floats, exact) for e, found in states.items()}
    assert lost[True] < 0.8 * lost[False]


@families
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_graph_and_the_checkpoint_compute_what_was_simulated(name: str, share: float) -> None:
    made, graph = uneven(name)
    at, held = allocation(made, STATIC, share), levels(name, even=True)
    for states in (
        held.states(at),
        held.states(at, feedback=True),
        propagate(made.executor, held, at, data(name)),
    ):
        want, _ = made.executor.run(made.example, variant_of(at, states))
        edit = build.edit_of(states, sizes_at(made.structure, at.widths))
        assert relative_gap(run_onnx(made, specialise(graph, edit), made.example), want) < SAME
        document, tensors = build.shrunk(made.module, made.program, made.structure, at, states)
        module = build.rebuild(copy.deepcopy(made.module), document, tensors)
        assert relative_gap(made.chosen(module(**made.example)), want) < 1e-3


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_search_that_starts_in_the_middle_sees_norms_that_are_divided(name: str) -> None:
    made, _ = uneven(name)
    held, rng = levels(name, even=True), np.random.default_rng(0)

    def scorer() -> Scorer:
        return Scorer(
            made.executor,
            held,
            data(name)[:2],
            readout=lambda outputs, _: outputs[0].flatten(1)[:, :96],
            oracle=lambda dense, other: float(((dense - other) ** 2).mean()),
        )

    cached, base = scorer(), allocation(made, "fp32")
    cached.score(base, keep=True)
    for site in base.levels:
        picked = {site: Level(base.levels[site].width, str(rng.choice([STATIC, STATIC, DYNAMIC])))}
        base = Allocation(dict(base.levels) | picked, 0.0, 0.0)
        assert cached.score(base, keep=True) == pytest.approx(scorer().score(base), rel=1e-5)


@families
@pytest.mark.parametrize("numeric", ["fp32", DYNAMIC])
def test_levels_without_calibrated_ranges_are_as_they_were(name: str, numeric: str) -> None:
    for share in (1.0, 0.5):
        at = allocation(uneven(name)[0], numeric, share)
        same(*(levels(name, even=e).states(at) for e in (False, True)))


@families
def test_where_evening_out_does_not_pay_weights_are_bit_for_bit_as_they_were(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zipc.numerics.smooth.GAIN", 0.0)
    for share in (1.0, 0.5):
        at = allocation(uneven(name)[0], STATIC, share)
        same(*(levels(name, even=e).states(at, feedback=True) for e in (False, True)))


def same(one: States, other: States) -> None:
    assert one.maps.keys() == other.maps.keys()
    assert one.tensors.keys() == other.tensors.keys()
    for module, state in one.maps.items():
        for a, b in zip(tensors_of(state), tensors_of(other.maps[module]), strict=True):
            assert torch.equal(a, b)
        assert state.activation == other.maps[module].activation


def tensors_of(state) -> list[Tensor]:  # type: ignore[no-untyped-def]
    integers = [] if state.integer is None else [state.integer.values, state.integer.scale]
    return [state.weight, *integers, *([] if state.bias is None else [state.bias])]


@families
def test_integers_of_the_maps_before_stay_and_what_they_stand_for_is_divided(name: str) -> None:
    made, _ = uneven(name)
    at, sites = allocation(made, STATIC), {s.name: s for s in made.sites}
    through = [p for p in passages(made.program, made.sites) if p.producer in made.calls]
    assert through
    plain, evened = (
        Levels(sites, made.calls, made.weights, *evidence(name), passages=some).states(at)
        for some in ([], through)
    )
    for passage in through:
        before, after = (s.maps[passage.producer] for s in (plain, evened))
        assert torch.equal(before.integer.values, after.integer.values)
        assert not torch.equal(before.integer.scale, after.integer.scale)
        assert before.activation == after.activation
