"""Everything the search needs to know about a model's sites: evidence, orders, weights, losses."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from zipc import quantizer
from zipc.core.errors import UsageError
from zipc.core.figures import three_digits
from zipc.core.files import fingerprint
from zipc.core.request import Request
from zipc.core.types import NARROW, Difference, Ladder, Level, Progress, Rung, Site, Target
from zipc.effort import Effort
from zipc.numerics.bf16 import BF16
from zipc.numerics.int4 import INT4
from zipc.numerics.int8 import DYNAMIC, FULL, REDUCED, STATIC
from zipc.offered import suits
from zipc.patterns import SPARSE, asked_for, notes_on, offers_sparse, sparse_level
from zipc.prepare import Prepared
from zipc.prices import Prices
from zipc.pruner.allocate.scorer import Scorer
from zipc.pruner.evidence import InputStats, collect
from zipc.pruner.experts import sweep_experts
from zipc.pruner.graph.passages import passages
from zipc.pruner.ladder import sweep_site, widths_of
from zipc.pruner.levels import Levels
from zipc.pruner.obs import Sweep
from zipc.pruner.workers import side_by_side
from zipc.samples import Feeds, Samples
from zipc.stage_cache import StageCache

ORDERED = 2  # sites whose units are put in order at a time: each holds several Gram matrices


@dataclass(slots=True)
class Candidates:
    """What an allocation is made from and judged by."""

    levels: Levels
    ladders: dict[str, Ladder]
    scorer: Scorer  # on the rows every candidate is scored on
    confirm: Scorer  # on more rows, for the finalists
    repair: list[Feeds]  # calibration rows for the repair of the chosen allocation
    notes: list[str]
    key: str

    @property
    def weights_key(self) -> str:
        """What the weights of a level depend on: the evidence, and what may be evened out."""
        return fingerprint(self.key, [p.producer for p in self.levels.passages])


def gather(
    prepared: Prepared,
    prices: Prices,
    target: Target,
    samples: Samples,
    request: Request,
    *,
    effort: Effort,
    cache: StageCache,
    progress: Progress,
) -> Candidates:
    """Collect evidence on calibration rows, order every site's units, set up the oracle.

    Raises:
        UsageError: activations are not finite, or the data holds too few rows.
    """

    def calibrating(limit: int) -> list[Feeds]:
        return samples.draw("calibration", limit=limit, seed=request.seed).batches

    calibration = calibrating(effort.calibration_texts)
    repair = calibrating(effort.repair_texts)
    sparse = offers_sparse(target, request)
    every = sparse or prepared.runtime.convolutions  # their producers are fitted or rounded too
    key = fingerprint(
        prepared.key,
        samples.sha256,
        _digest(calibration),  # how texts are read: another tokenizer, another length
        effort.calibration_texts,
        request.seed,
        [(s.name, s.units, s.maps) for s in prepared.structure.sites],  # another zipc finds others
        *([SPARSE] if every else []),
        *(["signed"] if target.signed else []),
    )
    stats, sweeps = _evidence(
        prepared, calibration, key, request, cache, progress, unit=samples.unit, every=every
    )
    ours = request.quantizer == "zipc"  # another rounds without evening out
    through = passages(prepared.program, prepared.structure.sites) if ours else []
    levels = Levels(
        prepared.sites,
        prepared.calls,
        prepared.weights,
        stats,
        sweeps,
        weight_limit=weight_limit(prices.table.fingerprint),
        floats=prepared.numeric,
        signed=target.signed,
        passages=through,
    )
    progress.stage("oracle on dense")

    def scorer(limit: int, seed: int, *, prefixes: bool) -> Scorer:
        drawn = samples.draw("search", limit=limit, seed=seed)
        return Scorer(
            prepared.executor,
            levels,
            drawn.batches,
            readout=drawn.readout,
            oracle=drawn.oracle,
            prefixes=prefixes,
        )

    first = scorer(effort.search_texts, request.seed, prefixes=True)
    second = scorer(effort.confirm_texts, request.seed + 1, prefixes=False)
    if prepared.body is not None:
        prepared.body = prepared.body.calibrated_on([prepared.for_graph(b) for b in repair])
    progress.done()
    notes: list[str] = []
    numerics = _numerics(prepared, prices, target, request, notes)
    ladders = {
        name: _ladder(name, prepared, prices, sweeps[name], target, request, numerics)
        for name in prepared.sites
    }
    doubt = None if prices.doubt is None else math.exp(prices.doubt.reach(["2:4"]))
    notes += notes_on(prepared, target, request, ladders, ms=prices.ms, doubted=doubt)
    return Candidates(levels, ladders, first, second, repair, notes, key)


def _digest(batches: Sequence[Feeds]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, values in sorted(batch.items()):
            digest.update(f"{name} {tuple(values.shape)}".encode())
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _evidence(
    prepared: Prepared,
    batches: Sequence[Feeds],
    key: str,
    request: Request,
    cache: StageCache,
    progress: Progress,
    *,
    unit: str,
    every: bool,
) -> tuple[dict[str, InputStats], dict[str, Sweep]]:
    modules = list(
        dict.fromkeys(
            m
            for s in prepared.structure.sites
            for m in s.maps
            if every or not prepared.calls[m].convolution or m in {c.module for c in s.consumers}
        )
    )
    folder = cache.get("evidence", key)
    if folder is not None:
        progress.stage("evidence")
        document = json.loads((folder / "sweeps.json").read_text())
        tensors = load_tensors((folder / "stats.safetensors").read_bytes())
        progress.done("reused")
        stats = {
            m: _stats_from(tensors, document["ranges"][leader], leader)
            for m, leader in document["modules"].items()
        }
        sweeps = {
            n: Sweep(tuple(s["order"]), tuple(s["errors"])) for n, s in document["sweeps"].items()
        }
        return stats, sweeps
    progress.stage("evidence", len(batches))
    stats = collect(
        prepared.executor,
        batches,
        modules=modules,
        seed=request.seed,
        on_batch=lambda: progress.advance(),
    )
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    progress.done(f"{rows:,} {unit}")
    progress.stage("order units", len(prepared.structure.sites))
    sites, weights = prepared.structure.sites, prepared.weights

    def order(site: Site) -> Sweep:
        if site.kind == "experts":
            return sweep_experts(prepared.executor, site, batches)
        if site.kind == "map":
            return Sweep((0,), (0.0, 1.0))
        return sweep_site(site, weights, stats, prepared.calls, seed=request.seed)

    sweeps = {}
    for site, made in zip(sites, side_by_side(order, sites, most=ORDERED), strict=True):
        sweeps[site.name] = made
        progress.advance(1, site.name)
    progress.done()
    cache.put("evidence", key, _evidence_files(stats, sweeps))
    return stats, sweeps


def _evidence_files(
    stats: Mapping[str, InputStats], sweeps: Mapping[str, Sweep]
) -> dict[str, bytes]:
    leaders: dict[int, str] = {}
    for module, held in stats.items():
        leaders.setdefault(id(held), module)
    tensors: dict[str, Tensor] = {}
    ranges: dict[str, Any] = {}
    for module, held in stats.items():
        if leaders[id(held)] == module:
            tensors |= {
                f"{module}/gram": held.gram,
                f"{module}/total": held.total,
                f"{module}/sample": held.sample.contiguous(),
            }
            ranges[module] = [held.count, held.low, held.high]
    document = {
        "modules": {m: leaders[id(s)] for m, s in stats.items()},
        "ranges": ranges,
        "sweeps": {n: {"order": s.order, "errors": s.errors} for n, s in sweeps.items()},
    }
    return {
        "stats.safetensors": save_tensors(tensors),
        "sweeps.json": json.dumps(document).encode(),
    }


def _stats_from(tensors: Mapping[str, Tensor], extent: Sequence[Any], leader: str) -> InputStats:
    return InputStats(
        tensors[f"{leader}/gram"],
        tensors[f"{leader}/total"],
        int(extent[0]),
        tensors[f"{leader}/sample"],
        float(extent[1]),
        float(extent[2]),
    )


def weight_limit(fingerprint: Mapping[str, Any]) -> int:
    """REDUCED where U8 x S8 products saturate: x86 without VNNI (ONNX Runtime's reduce_range)."""
    if fingerprint.get("runtime") == "tensorrt":  # whatever processor is beside the GPU
        return FULL
    x86 = str(fingerprint.get("arch", "")).lower() in ("x86_64", "amd64")
    vnni = any("vnni" in str(f) for f in fingerprint.get("isa", ()))
    return REDUCED if x86 and not vnni else FULL


def _numerics(
    prepared: Prepared, prices: Prices, target: Target, request: Request, notes: list[str]
) -> tuple[str, ...]:
    """Numerics the search may use, for every site that runs on integers.

    Raises:
        UsageError: the request names a numeric that no site of the model can have.
    """
    wanted, sites = request.numerics, prepared.sites
    known = (BF16, DYNAMIC, STATIC, INT4) if request.quantizer == "zipc" else (STATIC,)
    schemes = tuple(n for n in known if n in target.numerics)
    if prepared.body is not None:
        ms = prices.sum_ms({name: Level(s.units) for name, s in sites.items()})
        notes.append(f"the whole network in {prepared.numeric}, unpruned: {three_digits(ms)} ms")
        return ("fp32",)
    if wanted == prepared.floats:
        return ("fp32",)
    integers = [n for n, s in sites.items() if _rounds(prepared, s, request)]
    if (wanted in schemes or wanted == "int8") and not integers:
        raise UsageError(
            f"--numerics {wanted} is for linear maps, and no site of {request.model} has such "
            "alone. Use --numerics auto or fp32."
        )
    if wanted in schemes:
        return (wanted,)
    asked = any(g is not None for g in (request.speedup, request.latency_ms, request.max_drop))
    if wanted == "int8":
        schemes = tuple(n for n in schemes if n in (DYNAMIC, STATIC))
    elif not asked:  # the fastest, whatever it loses, is not what that means
        schemes = tuple(n for n in schemes if n != INT4)
    if not schemes or not integers:
        return ("fp32",)
    for scheme in schemes:
        full = {n: Level(s.units, scheme if n in integers else "fp32") for n, s in sites.items()}
        total = three_digits(prices.sum_ms(full))
        notes.append(f"{scheme} everywhere, unpruned: {total} ms")
    return schemes if wanted == "int8" else ("fp32", *schemes)


def _rounds(prepared: Prepared, site: Site, request: Request) -> bool:
    """Whether a site may leave floats: it can, and the quantizer takes it."""
    return prepared.on_integers(site) and (request.quantizer == "zipc" or quantizer.takes(site))


def _ladder(
    name: str,
    prepared: Prepared,
    prices: Prices,
    sweep: Sweep,
    target: Target,
    request: Request,
    numerics: tuple[str, ...],
) -> Ladder:
    site = prepared.sites[name]
    widths = widths_of(site, step=target.width_step) if request.prune else [site.units]
    if not _rounds(prepared, site, request):
        numerics = ("fp32",)
    levels = [lv for w in widths for lv in ([Level(w, n) for n in numerics] if w else [Level(0)])]
    if offers_sparse(target, request):
        sparse = (sparse_level(prepared, site, lv) for lv in levels)
        levels += [lv for lv in sparse if lv is not None]
    asked: list[Difference] = list(NARROW) if request.numerics != "auto" else []
    asked += ["2:4"] if request.pattern != "auto" else []
    levels = [
        level
        for level in levels
        if suits(level.within(prepared.numeric), site, target)
        and prices.gains(name, level, asked=asked)
    ]
    if request.pattern == SPARSE:
        levels = asked_for(levels, units=site.units)
    rungs = [Rung(lv, prices.ms(name, lv), sweep.errors[site.units - lv.width]) for lv in levels]
    return Ladder(name, sweep.order, tuple(rungs))


__all__ = ["Candidates", "gather", "weight_limit"]
