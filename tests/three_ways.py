"""Removing units three ways: in the module, in the traced program, and in the ONNX graph.

The oracle is the dense module whose maps are shown zeros for every unit that is gone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import onnxruntime as ort
import torch
from torch import Tensor

from tests.tiny_models import (
    Case,
    Kept,
    all_zeroed,
    edit_of,
    everything,
    random_kept,
    surgered,
    traced,
    variant_of,
)
from tests.zoo import LONGEST, ZOO, Family
from tests.zoo.adversarial import ADVERSARIES
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.onnx_export import export_dense
from zipc.exporters.specialise import specialise

Feeds = dict[str, Tensor]
EXACT = 1e-10
ROUNDED = 1e-5  # of families that round to float32 inside, whatever they are given
IN_ONNX = 1e-4  # norm of the difference, relative to the norm
AMPLIFIED = 4.0  # times what fp32 is off fp64: networks may amplify what they round
LIMITS = {"batch": 64, "sequence": LONGEST, "target": LONGEST}


def tolerance(family: Family) -> float:
    return EXACT if family.float64 else ROUNDED


def case_of(family: Family, dtype: torch.dtype = torch.float64) -> Case:
    """A family traced with all its outputs."""
    module = family.build().to(dtype)
    example = feeds_of(family, dtype)
    return traced(
        module,
        example,
        dynamic=family.dynamic,
        limits=LIMITS,
        outputs=None,
        as_traced=family.as_traced,
    )


@functools.cache
def double(name: str) -> Case:
    """A network of the zoo, or an adversary, traced in float64."""
    return case_of((ZOO | ADVERSARIES)[name])


@functools.cache
def single(name: str) -> tuple[Case, OnnxGraph]:
    """One of the zoo in float32, with its dense graph."""
    made = case_of(ZOO[name], torch.float32)
    return made, all_exported(made, ZOO[name])


def feeds_of(family: Family, dtype: torch.dtype = torch.float64, **sizes: int) -> Feeds:
    feeds = family.example(**sizes)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in feeds.items()}


def other_feeds(family: Family, dtype: torch.dtype = torch.float64) -> Feeds:
    """Not of the traced sizes."""
    sizes = {"length": 11} if family.modality == "text" else {}
    return feeds_of(family, dtype, batch=3, seed=1, **sizes)


def single_units(made: Case, *, most: int | None = None) -> Iterator[tuple[str, int, Kept]]:
    """Every unit of every site gone alone; with `most`, that many of each site, evenly spread."""
    for site in made.sites:
        if site.units == 1:
            continue
        count = site.units if most is None else min(most, site.units)
        for unit in sorted({i * (site.units - 1) // max(1, count - 1) for i in range(count)}):
            kept = [u for u in range(site.units) if u != unit]
            yield site.name, unit, everything(made) | {site.name: kept}


def whole_sites(made: Case) -> Iterator[tuple[str, Kept]]:
    """Every site that may go, gone alone."""
    for site in made.sites:
        if site.removable:
            yield site.name, everything(made) | {site.name: []}


def random_sets(made: Case, count: int) -> Iterator[Kept]:
    for seed in range(count):
        yield random_kept(made, seed)


@torch.no_grad()
def inert(made: Case, kept: Kept, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    return all_zeroed(made, kept, feeds)


@torch.no_grad()
def by_surgery(made: Case, kept: Kept, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    return made.chosen(surgered(made, kept)(**feeds))


@torch.no_grad()
def by_program(made: Case, kept: Kept, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    return made.executor.run(feeds, variant_of(made, kept))[0]


def prove_in_torch(made: Case, kept: Kept, feeds: Feeds, bound: float = EXACT) -> list[Tensor]:
    """Both torch ways agree with the oracle, which is returned."""
    want = inert(made, kept, feeds)
    assert gap(by_surgery(made, kept, feeds), want) < bound
    assert gap(by_program(made, kept, feeds), want) < bound
    return want


def all_exported(made: Case, family: Family) -> OnnxGraph:
    """The dense ONNX graph with all outputs."""
    return export_dense(
        made.program.exported,
        made.example,
        outputs=[(i, f"result_{i}") for i in range(len(made.program.outputs))],
        dynamic=family.dynamic,
    )


def by_onnx(made: Case, graph: OnnxGraph, kept: Kept, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    return run_onnx(made, specialise(graph, edit_of(made, kept)), feeds)


def run_onnx(made: Case, graph: OnnxGraph, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
    given = {i.name: feeds[i.name].numpy() for i in session.get_inputs()}
    names = [f"result_{i}" for i in range(len(made.program.outputs))]
    return [torch.from_numpy(value) for value in session.run(names, given)]


def gap(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference; infinite where the shapes differ."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


def relative_gap(got: list[Tensor], want: list[Tensor]) -> float:
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))
