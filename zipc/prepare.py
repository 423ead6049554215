"""From a model source to everything that is derived from its structure alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

import zipc
from zipc.core.errors import UnsupportedModel, UsageError
from zipc.core.files import fingerprint
from zipc.core.request import Request
from zipc.core.types import LeftAlone, Progress, Site
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.onnx_export import check_parity, export_dense
from zipc.exporters.specialise import Edit, specialise
from zipc.integer_body import IntegerBody
from zipc.model_source import SourceModel, run_as_traced_, trace_source
from zipc.numerics.int8 import STATIC
from zipc.pruner.graph.as_traced import AsTraced
from zipc.pruner.graph.interpret import Executor, Variant
from zipc.pruner.graph.sites import EXCLUDED, Structure, extent_size, find_sites, without
from zipc.pruner.graph.trace import MapCall, Program
from zipc.pruner.graph.verify import verify
from zipc.pruner.graph.whole_maps import with_whole_maps
from zipc.runtimes import RUNTIMES, CpuRuntime
from zipc.sources.common import Cache
from zipc.stage_cache import StageCache

PARITY_BOUND = 1e-4  # norm of dense ONNX minus torch, relative to torch


@dataclass(slots=True)
class Prepared:
    """A traced model with its sites and its dense ONNX graph."""

    source: SourceModel
    program: Program
    structure: Structure
    executor: Executor
    dense: OnnxGraph
    parity: float
    key: str  # names the model's structure and weights in the cache
    body: IntegerBody | None = None  # the whole network runs in INT8; sites are cut in floats
    floats: str = "fp32"  # what floats are on the target, whatever they are here
    runtime: CpuRuntime = RUNTIMES["onnxruntime"]

    @property
    def sites(self) -> dict[str, Site]:
        return {s.name: s for s in self.structure.sites}

    @property
    def left_alone(self) -> list[LeftAlone]:
        return self.structure.left_alone

    @property
    def calls(self) -> dict[str, MapCall]:
        return {c.module: c for c in reversed(self.program.maps)}

    def on_integers(self, site: Site) -> bool:
        """Whether all maps of a site have integer kernels here: linear maps do, but for routers,
        and plain convolutions where the runtime says so."""
        calls, convolutions = [self.calls[m] for m in site.maps], self.runtime.convolutions
        return site.kind != "experts" and all(
            c.plain and (convolutions or not c.convolution) for c in calls
        )

    @property
    def numeric(self) -> str:
        """What a site runs in whose level says nothing else."""
        return self.floats if self.body is None else STATIC

    def specialise(self, graph: OnnxGraph, edit: Edit, *, part: bool = False) -> OnnxGraph:
        """The dense graph, or that of one site, with an edit applied, as its runtime takes it."""
        return specialise(graph, edit, part=part, emitter=self.runtime.emitter)

    def timed(self, graph: OnnxGraph, edit: Edit, *, part: bool = False) -> bytes:
        """The same as its device is given it to time, the whole network in floats."""
        emitter = self.runtime.timed or self.runtime.emitter
        return specialise(graph, edit, part=part, emitter=emitter).to_bytes()

    def deployed(self, graph: OnnxGraph, edit: Edit, *, part: bool = False) -> bytes:
        """The same in what the whole network runs in."""
        model = self.timed(graph, edit, part=part)
        return model if self.body is None else self.body.emit(model, part=part)

    def example(
        self, *, batch: int, length: int, widths: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Inputs of the module at the widths of its sites: its cache has no place for the rest."""
        feeds = self.source.example(batch=batch, length=length)
        for name in self.program.caches:
            extents = self.structure.shapes.get(name, ())
            sizes = [extent_size(extent, widths or {}) for extent in extents]
            if 0 not in sizes:  # that of a removed layer is not read
                feeds[name] = feeds[name][tuple(slice(size) for size in sizes)].contiguous()
        return feeds

    def for_graph(self, feeds: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        """Inputs of the module as those of its ONNX graph."""
        names = self.source.cache.public if self.source.cache else {}
        return {names.get(name, name): tensor.numpy() for name, tensor in feeds.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.program.tensors.values())


def prepare(
    source: SourceModel, request: Request, *, cache: StageCache, progress: Progress
) -> Prepared:
    """Trace, find sites, export; the export is taken from the cache where it is there.

    Raises:
        UnsupportedModel: it cannot be traced or exported, or nothing in it can be removed, and
            no map rounded.
        ExportMismatch: ONNX Runtime does not reproduce the torch module.
    """
    progress.stage("trace")
    program = trace_source(source, batch=request.batch_size)
    if source.cache is None and (request.sequence_length or 0) > source.max_length:
        raise UsageError(
            f"--sequence-length {request.sequence_length} is more than the graph is for: "
            f"{source.notes[-1]}. Give {source.max_length} or less."
        )
    example = source.example()
    told = len(source.notes)
    found = discover(source, program, include=request.include, exclude=request.exclude)
    structure = _searched(found)
    cut = structure.sites
    structure = with_whole_maps(
        program, structure, include=request.include, exclude=request.exclude
    )
    if not (cut if request.numerics == "fp32" else structure.sites):
        names = [a.path for a in structure.left_alone if a.reason == EXCLUDED]
        if names:
            raise UsageError(
                f"--include and --exclude leave no site of {request.model}. Its sites: "
                f"{', '.join(names[:6])}{', …' if names[6:] else ''}."
            )
        reasons = "; ".join(f"{a.path}: {a.reason}" for a in structure.left_alone[:3])
        raise UnsupportedModel(
            f"Nothing in {request.model} can be removed{' (' + reasons + ')' if reasons else ''}. "
            f"To see every part with its reason, run: zipc inspect {request.model}"
        )
    whole = len(structure.sites) - len(cut)
    count = f"{len(cut)} sites, {len(structure.left_alone)} left alone"
    progress.done(f"{count}, {whole} maps whose numeric alone is chosen" if whole else count)
    for note in source.notes[told:]:
        progress.info(note)
    progress.stage("export")
    key = fingerprint(
        source.sha256,
        source.outputs,
        source.all_specs,
        str(program.exported.graph),  # a factory's code may change under equal weights
        _versions(),
        dataclasses.asdict(request.workload),
    )
    dense = _load_graph(cache, key)
    reused = dense is not None
    if dense is None:
        cache_ends = source.cache or Cache((), (), ())
        dense = export_dense(
            program.exported,
            example,
            outputs=[*source.outputs, *cache_ends.outputs],
            dynamic=source.dynamic,
            inputs=cache_ends.public,
        )
        _save_graph(cache, key, dense)
    prepared = Prepared(source, program, structure, Executor(program, structure), dense, 0.0, key)
    prepared.parity = _check(prepared, request)
    progress.done("reused" if reused else f"parity {prepared.parity:.1e}")
    return prepared


def discover(
    source: SourceModel, program: Program, *, include: Sequence[str], exclude: Sequence[str]
) -> Structure:
    """The sites of a traced model that its module follows, the residual width among them.

    A module whose code follows at fewer of them runs its graph from now on.
    """
    structure = find_sites(program, include=include, exclude=exclude)
    example = source.example(cached=False)
    found = verify(source.module, program, structure, example)
    if len(found.sites) == len(structure.sites):
        return found
    traced = verify(AsTraced(source.module, program, structure), program, structure, example)
    if len(traced.sites) <= len(found.sites):
        return found
    run_as_traced_(source, program, structure, found)
    held = {site.name for site in found.sites}
    names = [s.name.split("+")[0] for s in traced.sites if s.name not in held]
    some = ", ".join(names[:2]) + (", ..." if names[2:] else "")
    source.notes.append(
        f"the code of the model does not follow the width of {len(names)} sites ({some}): where "
        "they are cut, zipc.load gives its traced graph"
    )
    return traced


def _searched(structure: Structure) -> Structure:
    """The sites a search may change.

    A residual width that norms run over stays: a unit of it is read in every layer, and its part of
    every mean and variance goes with it (`benchmarks/bench_residual_width.py` has what that costs).
    """
    reason = (
        "norms run over this residual width: it is not searched, since narrower blocks cost less "
        "at equal multiply-adds"
    )
    return without(structure, {s.name: reason for s in structure.sites if s.normed})


def _check(prepared: Prepared, request: Request) -> float:
    source = prepared.source
    example = prepared.example(batch=3, length=min(24, source.max_length))
    caches = [] if source.cache is None else [name for _, name in source.cache.outputs]
    kept = {node.name: torch.empty(0) for node in prepared.program.kept}
    expected, _ = prepared.executor.run(example, Variant(), captured=kept)
    runner = prepared.runtime.runner(prepared.dense.to_bytes(), workload=request.workload)
    outputs = runner.outputs(prepared.for_graph(example))
    return check_parity(
        [outputs[name] for name in (*(n for _, n in source.outputs), *caches)],
        [t.numpy() for t in (*expected, *kept.values())],
        bound=PARITY_BOUND,
        what="the dense ONNX graph against torch",
    )


def _versions() -> list[str]:
    import transformers

    return [zipc.__version__, torch.__version__, transformers.__version__, onnx.__version__]


def _save_graph(cache: StageCache, key: str, graph: OnnxGraph) -> None:
    side = {
        "weights": graph.weights,
        "shapes": graph.shapes,
        "types": graph.types,
        "origin": graph.origin,
        "results": graph.results,
    }
    cache.put(
        "export", key, {"dense.onnx": graph.to_bytes(), "names.json": json.dumps(side).encode()}
    )


def _load_graph(cache: StageCache, key: str) -> OnnxGraph | None:
    folder = cache.get("export", key)
    if folder is None:
        return None
    graph = OnnxGraph.of(onnx.load_from_string(Path(folder / "dense.onnx").read_bytes()))
    side = json.loads((folder / "names.json").read_text())
    graph.weights = {k: (str(v[0]), bool(v[1])) for k, v in side["weights"].items()}
    graph.shapes, graph.types = side["shapes"], side["types"]
    graph.origin, graph.results = side["origin"], side["results"]
    return graph
