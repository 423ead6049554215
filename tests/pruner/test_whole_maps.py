"""Linear maps that no site cuts: found, rounded alone, and given back by `zipc.load`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.plain_levels import plain_levels
from tests.tiny_folders import save_family
from zipc.build import build, checkpoint
from zipc.core.request import Request
from zipc.core.types import Allocation, Level, Silent, Site, Workload
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.site_graph import extract
from zipc.exporters.specialise import Edit, Int8Weights, specialise
from zipc.model_source import load_source, settle
from zipc.numerics.int8 import DYNAMIC, STATIC, quantize_weight
from zipc.plain_edits import plain_edit
from zipc.prepare import Prepared, prepare
from zipc.pruner.evidence import collect
from zipc.pruner.graph import whole_maps
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.graph.passages import passages
from zipc.pruner.levels import Levels
from zipc.pruner.obs import Sweep
from zipc.runtimes import integer_kernels
from zipc.stage_cache import StageCache

VOCABULARY = 600  # times 32: more than LEAST_WEIGHTS
FAMILIES = ["gpt2", "llama", "llama-tied", "t5", "bert-masked"]
WORKLOAD = Workload(sequence_length=16)


def prepared(folder: Path, family: str, **asked: object) -> Prepared:
    path = save_family(family, folder / family, vocab_size=VOCABULARY)
    source = load_source(str(path))
    request = settle(Request(model=str(path), **asked), source)
    return prepare(source, request, cache=StageCache(folder / "cache"), progress=Silent())


def whole(made: Prepared) -> dict[str, Site]:
    return {name: site for name, site in made.sites.items() if site.kind == "map"}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def last(model: Prepared) -> str:
    (name,) = whole(model)
    return name


def test_the_last_map_of_a_language_model_is_one(model: Prepared, last: str) -> None:
    assert last in ("lm_head", "cls.predictions.decoder")
    site = model.sites[last]
    assert (site.units, site.least, site.maps) == (1, 1, (last,))
    assert last in [part.path for part in model.left_alone]  # it is not cut


@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC])
def test_it_is_rounded_and_an_embedding_of_the_same_weight_is_not(
    model: Prepared, last: str, numeric: str
) -> None:
    call = model.calls[last]
    weight = model.weights[call.weight]
    rounded = quantize_weight(weight)
    at = None if numeric == DYNAMIC else (0.05, 128)
    integers = Int8Weights(rounded.values.numpy(), rounded.scale.numpy(), at)
    graph = specialise(model.dense, Edit(int8={last: integers}))
    assert integer_kernels(graph.to_bytes()) == 1
    gathered = {n.input[0] for n in graph.nodes if n.op_type == "Gather"}
    tables = [graph.arrays[name] for name in gathered if name in graph.arrays]
    assert any(t.shape == weight.shape and t.dtype == np.float32 for t in tables)


def test_a_graph_of_its_own_has_its_weight_among_the_initialisers(
    model: Prepared, last: str
) -> None:
    part = extract(model.dense, model.sites[last])
    (call,) = part.map_nodes(model.calls[last].weight)
    assert call.output[0] in part.shapes
    assert all(part.shapes[i.name][-1] != VOCABULARY for i in part.proto.graph.input)


def test_weights_written_as_they_were_are_not_stored_twice(model: Prepared, last: str) -> None:
    weight = model.calls[last].weight
    same = specialise(model.dense, Edit({weight: model.weights[weight].numpy()}))
    dense = specialise(model.dense, Edit())
    assert len(same.to_bytes()) == len(dense.to_bytes())


def test_other_values_are_read_by_the_map_alone(model: Prepared, last: str) -> None:
    call = model.calls[last]
    other = model.weights[call.weight] * 2
    graph = specialise(model.dense, Edit({call.weight: other.numpy()}))
    feeds = model.example(batch=2, length=9)
    names = [name for _, name in model.source.outputs]
    runner = model.runtime.runner(graph.to_bytes(), workload=WORKLOAD)
    found = runner.outputs(model.for_graph(feeds))
    module = model.source.module
    held = module.get_submodule(last)
    before = held.weight
    held.weight = torch.nn.Parameter(other)  # unties it
    try:
        with torch.no_grad():
            expected = model.source.chosen(module(**feeds))
    finally:
        held.weight = before
    for name, want in zip(names, expected, strict=True):
        assert np.abs(found[name] - want.numpy()).max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC])
def test_what_is_built_is_what_was_simulated_and_is_loaded(
    model: Prepared, last: str, numeric: str
) -> None:
    batches = [model.example(batch=4, length=12)]
    sites = whole(model)
    stats = collect(model.executor, batches, modules=[last])
    sweeps = {last: Sweep((0,), (0.0, 1.0))}
    through = passages(model.program, [*sites.values()])
    levels = Levels(sites, model.calls, model.weights, stats, sweeps, passages=through)
    allocation = Allocation({last: Level(1, numeric)}, 1.0, 0.0)
    states = levels.states(allocation)
    assert states.maps[last].numeric == numeric
    built = build(model, allocation, states, workload=WORKLOAD)
    assert built.integer_products == 1
    assert built.parity < 0.02
    document, tensors, module = checkpoint(model, allocation, states)
    assert document["numerics"] == {last: numeric}
    (expected, *_), _ = model.executor.run(batches[0], levels.variant(allocation))
    with torch.no_grad():
        found = model.source.chosen(module(**batches[0]))[0]
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    (dense, *_), _ = model.executor.run(batches[0], Variant())
    assert 0 < (expected - dense).norm() <= 0.05 * dense.norm()
    assert tensors[f"{last}.weight"].dtype == torch.int8


def test_globs_hold_for_them_too(tmp_path: Path) -> None:
    assert not whole(prepared(tmp_path, "gpt2", exclude=("lm_*",)))
    assert set(prepared(tmp_path, "llama", include=("lm_*",)).sites) == {"lm_head"}


def test_small_ones_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_maps, "LEAST_WEIGHTS", VOCABULARY * 32 + 1)
    assert not whole(prepared(tmp_path, "gpt2"))


def test_the_reference_keeps_one_copy_of_a_tied_weight(tmp_path: Path) -> None:
    made = prepared(tmp_path, "gpt2")
    held = onnx.load_from_string(specialise(made.dense, Edit()).to_bytes())
    sizes = [sorted(t.dims) for t in held.graph.initializer]
    assert sizes.count([32, VOCABULARY]) == 1
    assert isinstance(made.dense, OnnxGraph)


def test_maps_of_constants_stay_in_floats(tmp_path: Path) -> None:
    """As those of the distances of a DeBERTa, which no runtime computes more than once."""
    path = save_family("deberta", tmp_path / "deberta")
    source = load_source(str(path))
    request = settle(Request(model=str(path)), source)
    made = prepare(source, request, cache=StageCache(tmp_path / "cache"), progress=Silent())
    fixed = {call.module for call in made.calls.values() if call.fixed}
    assert {path.rpartition(".")[2] for path in fixed} == {"pos_key_proj", "pos_query_proj"}
    batches = [made.example(batch=4, length=12)]
    levels = plain_levels(made, batches)
    heads = {n: Level(s.units - 1, DYNAMIC) for n, s in made.sites.items() if s.kind == "heads"}
    allocation = Allocation(heads, 1.0, 0.0)
    states = levels.states(allocation)
    numerics = {m: state.numeric for m, state in states.maps.items() if m not in fixed}
    assert set(numerics.values()) == {DYNAMIC}
    assert {states.maps[m].numeric for m in fixed} == {"fp32"}
    built = build(made, allocation, states, workload=WORKLOAD)
    assert built.integer_products == len(numerics)
    edit = plain_edit(made, heads, {n: tuple(range(lv.width)) for n, lv in heads.items()})
    assert set(edit.int8) == set(numerics)
