"""For every kind of network: units removed equal units that nobody is shown, three ways."""

from __future__ import annotations

import copy
from dataclasses import replace

import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from tests.three_ways import (
    AMPLIFIED,
    IN_ONNX,
    by_onnx,
    double,
    feeds_of,
    gap,
    inert,
    other_feeds,
    prove_in_torch,
    random_sets,
    relative_gap,
    run_onnx,
    single,
    single_units,
    tolerance,
    whole_sites,
)
from tests.tiny_models import Kept, edit_of, everything, random_kept
from tests.zoo import ZOO
from zipc import build
from zipc.core.types import Allocation, Level
from zipc.exporters.site_graph import extract
from zipc.exporters.specialise import specialise
from zipc.pruner.compensate.propagate import propagate
from zipc.pruner.evidence import collect
from zipc.pruner.experts import sweep_experts
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.graph.sites import sizes_at
from zipc.pruner.ladder import sweep_site
from zipc.pruner.levels import Levels
from zipc.pruner.states import variant_of

pytestmark = pytest.mark.xdist_group("zoo")
families = pytest.mark.parametrize("name", ZOO)
NOTICED = 3e-4  # of outputs of size 1: what the least important unit of the zoo changes and more
PER_SITE = 2  # units tried in ONNX Runtime at each site, the first and the last; all if slow

# Kind and units of every site: w width, c channels, f ffn, h heads; + may be removed as a whole.
SITES: dict[str, str] = {
    "cifar-resnet8": "w4 c4+ c8+ c16+",
    "cifar-resnet20": "w4 c4+ c4+ c4+ c8+ c8+ c8+ c16+ c16+ c16+",
    "bottleneck-resnet": "c6 c4+ c4+ w12 c4+ c4+ c8+ c8+ w16 c8+ c8+",
    "resnext": "c6 c2+ c4 c4+ w12 c2+ c4 c4+ c2+ c8 c8+ w16 c2+ c8 c8+",
    "groupnorm": "c4+ c6",
    "instancenorm": "c6 c8 c6 c8",
    "vgg": "c4 c6 c6 c8 f12",
    "googlenet": "c6 c4 c3+ c5 c2+ c3 c4 c3 c4+ c6 c2+ c4 c3",
    "densenet": "c6 c8+ c4 c8+ c4 c8+ c4 c9 c8+ c4 c8+ c4",
    "mobilenet-v2": "c6 c4 c12 w6 c16+ c12 c8 c16",
    "mobilenet-v3": "w6 c8+ c4+ c12 c5+ w8 c16+ c16 f12",
    "shufflenet": "c4+ c4+ c2 c3 c5",
    "unet": "c4 c4 c6+ c6 c8+ c8 c6 c6+ c6 c4 c4 c4",
    "unet-upsample": "c4 c4 c6+ c6 c8+ c8+ c6 c6+ c6+ c4 c4 c4",
    "sounds": "c6 c8",
    "yolo": (
        "c4 c8 w4 c4+ c4+ c8 c12+ w6 c6+ c12+ c6+ c10 "
        "c3 c3+ c3 c6+ c6 c4 c4+ c4 c10+ c6+ c5+ c6+ c5+"
    ),
    "bert": "h4+ w32 f12+ h4+ f12+ f32",
    "bert-masked-lm": "h4+ f12+ h4+ f12+",
    "roberta": "h4+ w32 f12+ h4+ f12+ f32",
    "distilbert": "h4+ w32 f12+ h4+ f12+ f32",
    "electra": "w32 h4+ f12+ h4+ f12+ f32",
    "albert": "w32 h4+ f12+ f32",
    "mpnet": "h4+ w32 f12+ f12+ f32",
    "gpt2": "h4+ f12+ h4+ f12+",
    "opt": "h4+ f12+ h4+ f12+",
    "llama": "h2+ w32 f12+ h2+ f12+",
    "llama-mqa": "h4+ f12+ h4+ f12+",
    "qwen2": "h2+ w32 f12+ h2+ f12+",
    "mistral": "h2+ w32 f12+ h2+ f12+",
    "phi3": "h2+ w32 f12+ h2+ f12+",
    "mixtral": "h2+ e4 f12+ f12+ f12+ f12+ h2+ e4 f12+ f12+ f12+ f12+",
    "qwen2-moe": "h2+ f8+ e5 f6+ f6+ f6+ f6+ f6+ h2+ f8+ e5 f6+ f6+ f6+ f6+ f6+",
    "t5": "h4+ f12+ f12+ h4+ h4+ f12+ h4+ f12+",
    "t5-gated": "h4+ f12+ f12+ h4+ h4+ f12+ h4+ f12+",
    "torch-text": "h4+ w12 f24+ h4+ f24+ h4+ h4+ f12+",
    "vit": "w32 h4+ f12+ h4+ f12+",
    "deit": "w32 h4+ f12+ h4+ f12+",
    "swin": "w8 h2+ f12+ h2+ f12+ w16 h4+ f24+ h4+ f24+",
    "pvt-v2": "w8 h2+ f16+ w12 h3+ f24+",
    "convnext": "w8 f32+ f32+ w12 f48+ f48+",
    "resnet": "c6 c3+ c3+ w12 c3+ c3+ c4+ c4+ w16 c4+ c4+",
    "mobilevit": (
        "w4 c8+ c8 w6 c16+ c16+ c16 c8 c8+ h2+ f12+ h2+ f12+ c8 w8 "
        "c16+ c8+ h2+ f18+ h2+ f18+ h2+ f18+ h2+ f18+ c8 w8 c16+ c8+ h2+ f24+ h2+ f24+ h2+ f24+ "
        "c8 c8 c12"
    ),
    "efficientnet": "c2 c4 c8 c2+ w6 c12+ c3+ c12 c3+ c8 c80",
}


def prove(name: str, kept: Kept, feeds: dict[str, Tensor]) -> list[Tensor]:
    return prove_in_torch(double(name), kept, feeds, tolerance(ZOO[name]))


@families
def test_every_unit_removed_equals_inert_and_is_noticed(name: str) -> None:
    made = double(name)
    dense = inert(made, everything(made), made.example)
    for site, unit, kept in single_units(made):
        want = prove(name, kept, made.example)
        assert gap(dense, want) > NOTICED, (site, unit)


@families
def test_whole_sites_removed_equal_inert(name: str) -> None:
    made = double(name)
    for _, kept in whole_sites(made):
        prove(name, kept, made.example)


@families
def test_random_units_of_several_sites_removed_equal_inert(name: str) -> None:
    for kept in random_sets(double(name), 6):
        prove(name, kept, other_feeds(ZOO[name]))


@families
def test_nothing_removed_changes_nothing(name: str) -> None:
    made = double(name)
    feeds = other_feeds(ZOO[name])
    with torch.no_grad():
        dense = made.chosen(made.module(**feeds))
    prove(name, everything(made), feeds)
    got, _ = made.executor.run(feeds, Variant())
    assert gap(got, dense) < tolerance(ZOO[name])


@families
def test_what_is_left_alone_keeps_its_width(name: str) -> None:
    made = double(name)
    calls = {call.module: call for call in made.program.maps}
    cut = {(piece.parameter, piece.dim) for site in made.sites for piece in site.slices}
    for entry in made.structure.left_alone:
        call = calls.get(entry.path)
        assert call is None or (call.weight, call.out_dim) not in cut, entry


def check_onnx(name: str, kept: Kept, feeds: dict[str, Tensor]) -> None:
    made, graph = single(name)
    assert relative_gap(by_onnx(made, graph, kept, feeds), inert(made, kept, feeds)) < IN_ONNX


@families
def test_onnx_runtime_agrees_on_units_sites_and_random_sets(name: str) -> None:
    made, _ = single(name)
    for _, _, kept in single_units(made, most=PER_SITE):
        check_onnx(name, kept, made.example)
    for _, kept in whole_sites(made):
        check_onnx(name, kept, made.example)
    for kept in random_sets(made, 3):
        check_onnx(name, kept, other_feeds(ZOO[name], torch.float32))


@families
def test_every_site_is_priced_on_a_graph_with_all_that_it_cuts(name: str) -> None:
    """Cut out with its surroundings, a site can lose a unit, or all, and the rest still runs."""
    made, graph = single(name)
    for site in made.sites:
        cut = {piece.parameter for piece in site.slices} & set(graph.weights)
        part = extract(graph, site)
        assert cut <= set(part.weights)
        for units in [range(1, site.units)] + ([range(0)] if site.removable else []):
            edit = edit_of(made, everything(made) | {site.name: list(units)})
            own = {n: t for n, t in edit.tensors.items() if n in part.weights}
            narrow = specialise(part, replace(edit, tensors=own))
            ort.InferenceSession(narrow.to_bytes(), providers=["CPUExecutionProvider"])


@families
def test_repaired_weights_are_the_same_in_torch_onnx_runtime_and_a_checkpoint(name: str) -> None:
    made, graph = single(name)
    data = [feeds_of(ZOO[name], torch.float32, batch=4, seed=s) for s in range(2)]
    sites = {s.name: s for s in made.sites}
    stats = collect(made.executor, data, modules=[c.module for c in made.program.maps])
    sweeps = {
        n: sweep_experts(made.executor, s, data)
        if s.experts
        else sweep_site(s, made.weights, stats, made.calls)
        for n, s in sites.items()
    }
    levels = Levels(sites, made.calls, made.weights, stats, sweeps)
    for seed in range(3):
        widths = {n: len(k) for n, k in random_kept(made, seed).items()}
        allocation = Allocation({n: Level(w) for n, w in widths.items()}, 0.0, 0.0)
        states = propagate(made.executor, levels, allocation, data)
        want, _ = made.executor.run(made.example, variant_of(allocation, states))
        program, structure = made.program, made.structure
        document, tensors = build.shrunk(made.module, program, structure, allocation, states)
        module = build.rebuild(copy.deepcopy(made.module), document, tensors)
        got = made.chosen(module(**made.example))
        finer = {n: t.double() if t.is_floating_point() else t for n, t in made.example.items()}
        exact = made.chosen(module.double()(**finer))
        bound = max(IN_ONNX, AMPLIFIED * relative_gap(got, exact))
        assert relative_gap(got, want) < bound
        edit = build.edit_of(states, sizes_at(made.structure, widths))
        assert relative_gap(run_onnx(made, specialise(graph, edit), made.example), want) < bound


@pytest.mark.slow
@families
def test_onnx_runtime_agrees_on_every_unit_and_many_random_sets(name: str) -> None:
    made, _ = single(name)
    for _, _, kept in single_units(made):
        check_onnx(name, kept, made.example)
    for kept in random_sets(made, 30):
        check_onnx(name, kept, other_feeds(ZOO[name], torch.float32))


@families
def test_sites_are_those_that_the_architecture_has(name: str) -> None:
    """A tool that finds nothing would pass all of the above."""
    made = double(name)
    found = [f"{s.kind[0]}{s.units}{'+' if s.removable else ''}" for s in made.sites]
    assert " ".join(found) == SITES[name]
    reasons = [entry.reason for entry in made.structure.left_alone]
    assert all(reasons)
    inside = {p.parameter.rpartition(".")[0] for s in made.sites for p in s.slices}
    outside = {m for entry in made.structure.left_alone for m in entry.path.split("+")}
    assert {call.module for call in made.program.maps} <= inside | outside
