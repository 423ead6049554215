"""The pipeline. `compile_model` is zipc on one screen: each line takes and returns named types."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from zipc.build import checkpoint, dense_model
from zipc.candidates import Candidates, gather, weight_limit
from zipc.closed_loop import (
    FINALISTS,
    ClosedLoop,
    Found,
    choose,
    make_problem,
)
from zipc.core.beside import beside
from zipc.core.errors import UsageError, ZipcError
from zipc.core.memory import release
from zipc.core.request import Request
from zipc.core.types import (
    Allocation,
    LeftAlone,
    PairedTiming,
    Progress,
    Runner,
    Site,
    Target,
)
from zipc.devices import open_device
from zipc.effort import effort_of
from zipc.exporters.tensorrt.engine import Engine, build_engine, choose_builder
from zipc.exporters.tensorrt.script import build_script
from zipc.integer_body import IntegerBody
from zipc.latency_tables.store import TableStore, default_cache_dir
from zipc.manifest import Manifest
from zipc.model_source import SourceModel, load_source, settle, with_cache
from zipc.modelled_device import predicted_timing
from zipc.numerics.int8 import FULL, STATIC
from zipc.output import check_output, staged, write_artifacts
from zipc.prepare import Prepared, prepare
from zipc.pricing import Prices, price
from zipc.profiler.device import Device, TimedGraph
from zipc.profiler.timing import warm_up
from zipc.proof import default_pairs, paired_speedup
from zipc.quantizer import check_modelopt
from zipc.record import make_manifest, read_quality, samples_of
from zipc.runtimes import runtime_of
from zipc.samples import Samples, kind_of, open_samples
from zipc.shipped import Shipped, layout, ship
from zipc.sources.common import BATCH
from zipc.stage_cache import StageCache
from zipc.targets import AUTO, ON_CPU, on_runtime, requested_target
from zipc.turns import by_default, faster_runtime

BODY_PAIRS = 60
LEAST_MORE, MOST_MORE = 1.01, 1.05  # asked for where the first artifact missed by little
BODY_GAIN = 1.4  # least speedup of the unpruned network for which it is brought to INT8


def compile_model(request: Request, *, progress: Progress) -> Manifest:
    """Take a model to an artifact whose speedup has been measured, and write the output folder.

    Raises:
        ZipcError: see `core.errors`; a missed or inconclusive verdict is not an error but a result.
    """
    out = _output(request)
    with _one_thread():
        clock, cache = Clock(progress), _cache(request)
        setup = _set_up(request, clock)
        request = setup.request
        dense = dense_model(setup.prepared)
        timer = setup.device.timer()
        reference = timer.load(dense, workload=request.workload)
        goal = target_speedup(request, reference)
        loop = ClosedLoop(
            setup.prepared,
            setup.prices,
            setup.candidates,
            request,
            timer=timer,
            reference=reference,
            effort=effort_of(request.effort),
            cache=cache,
            progress=clock,
        )
        found, compiled, timing = _proved(loop, goal)
        measured = setup.device.kind == "measured"
        short = goal is not None and timing.ci95[0] < goal
        if measured and goal is not None and short and not found.solution.unreachable:
            loop.forget()
            more = min(max(goal / timing.ci95[0], LEAST_MORE), MOST_MORE)
            told = (
                f"a first artifact measured {timing.speedup:.3f}x: searched for {more - 1:.1%} more"
            )
            clock.info(told)
            again = _proved(loop, goal * more)
            if not again[0].solution.unreachable:
                setup.candidates.notes.append(told)
                found, compiled, timing = again
        if measured:
            models = [dense, found.built.model]
            setup.candidates.notes.append(
                by_default(setup.device, models, request.workload, setup.target, clock)
            )
        setup.candidates.notes += [
            n for n in setup.device.notes if n not in setup.prices.table.notes
        ]
        structure, tensors, _ = checkpoint(
            setup.prepared, found.built.allocation, found.built.states
        )
        shipped = ship(
            setup.prepared,
            found.built,
            dense,
            target=setup.target,
            workload=request.workload,
            batches=[setup.prepared.for_graph(b) for b in setup.candidates.repair],
        )
        setup.candidates.notes += shipped.notes
        engine = _engine(setup.target, shipped, request, clock)
        if engine is not None:
            setup.candidates.notes.append(str(engine))
        clock.stage("quality on test")
        quality = read_quality(
            setup.samples,
            dense=shipped.reference,
            compiled=shipped.model,
            runtime=runtime_of(setup.target).runner.runtime,
            seed=request.seed,
        )
        clock.done()
        with staged(out) as folder:
            files = write_artifacts(
                folder,
                model=shipped.model,
                reference=shipped.reference if request.keep_reference else None,
                engine=None if engine is None else engine.plan,
                script=None
                if measured
                else build_script(
                    shipped.model,
                    target=setup.target,
                    workload=request.workload,
                    timing=timing,
                    predicted_ms=found.solution.predicted_ratio * setup.prices.dense_ms,
                ),
                layout=layout(
                    shipped,
                    request,
                    source=setup.prepared.source.source,
                    target=setup.target,
                    plan=None if engine is None or engine.rtx else engine.plan,
                ),
                structure=structure,
                tensors=tensors,
                source_folder=setup.prepared.source.folder,
                samples=samples_of(timing, request.workload) if measured else None,
            )
            manifest = make_manifest(
                request,
                goal=goal,
                target=setup.target,
                prepared=setup.prepared,
                prices=setup.prices,
                candidates=setup.candidates,
                samples=setup.samples,
                found=found,
                timing=timing,
                quality=quality,
                sizes=(len(shipped.reference), len(shipped.model)),
                tensors=tensors,
                session_options=compiled.session_options,
                files=files,
                seconds=clock.seconds,
            )
            manifest.write(folder)
        if manifest.verdict == "missed":
            loop.forget()
    return manifest


def _proved(loop: ClosedLoop, goal: float | None) -> tuple[Found, TimedGraph, PairedTiming]:
    """An artifact, and the one measurement, or prediction, its verdict is read from."""
    found = loop.find(goal)
    compiled = loop.timer.load(found.built.model, workload=loop.request.workload)
    if loop.prices.doubt is not None:
        allocation, doubt = found.built.allocation, loop.prices.doubt
        return found, compiled, predicted_timing(loop.reference, compiled, allocation, doubt)
    pairs = min(default_pairs(loop.prices.dense_ms), loop.effort.verdict_pairs)
    timing = paired_speedup(loop.reference, compiled, pairs=pairs, progress=loop.progress)
    return found, compiled, timing


def _engine(target: Target, shipped: Shipped, request: Request, clock: Clock) -> Engine | None:
    """The engine that was asked for, for the GPU of the target."""
    if request.engine is None:
        return None
    assert target.sheet is not None
    clock.stage("engine")
    built = build_engine(
        shipped.model,
        builder=choose_builder(request.engine, target.sheet.sm),
        compute_capability=target.sheet.sm,
        workload=request.workload,
        places=shipped.places,
        cache=_cache_root(request) / "tensorrt",
    )
    clock.done(f"{len(built.plan) / 1e6:.1f} MB for {built.compute_capability}, never run")
    return built


@dataclass(frozen=True, slots=True)
class Plan:
    """An allocation that meets the request by prediction; nothing was built."""

    allocation: Allocation
    sites: list[Site]
    left_alone: list[LeftAlone]
    dense_ms: float
    predicted_ms: float
    predicted_speedup: float
    oracle_loss: float
    split: dict[str, int]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        units = {s.name: s.units for s in self.sites}
        return {
            "allocation": [
                {
                    "site": n,
                    "units": units[n],
                    "level": {"width": lv.width, "numeric": lv.numeric, "pattern": lv.pattern},
                }
                for n, lv in self.allocation.levels.items()
            ],
            "left_alone": [{"path": a.path, "reason": a.reason} for a in self.left_alone],
            "dense_ms": self.dense_ms,
            "predicted_ms": self.predicted_ms,
            "predicted_speedup": self.predicted_speedup,
            "oracle_loss": self.oracle_loss,
            "split": self.split,
            "notes": self.notes,
        }


def plan_model(request: Request, *, progress: Progress) -> Plan:
    """Everything up to the allocation.

    Raises:
        TargetUnreachable: no allocation meets the request; carries the best speedup.
    """
    with _one_thread():
        clock = Clock(progress)
        setup = _set_up(request, clock)
        request = setup.request
        reference = setup.device.timer().load(
            dense_model(setup.prepared), workload=request.workload
        )
        goal = target_speedup(request, reference)
        problem = make_problem(
            setup.prepared, setup.prices, setup.candidates, request, _cache(request), clock
        )
        effort = effort_of(request.effort)
        if goal is None:
            allocation = problem.allocation([int(t.argmin()) for t in problem.times])
            loss = setup.candidates.confirm.score(allocation)
        else:
            allocation, loss, _ = choose(
                problem,
                setup.prices,
                setup.candidates,
                ratio=1 / goal,
                trials=effort.trials,
                seconds=effort.search_seconds,
                finalists=FINALISTS,
                rng=np.random.default_rng(request.seed),
                progress=clock,
            )
        ratio = setup.prices.ratio(allocation.predicted_ms)
        numeric = setup.prepared.numeric
        levels = {n: lv.within(numeric) for n, lv in allocation.levels.items()}
        return Plan(
            allocation=replace(allocation, levels=levels),
            sites=setup.prepared.structure.sites,
            left_alone=setup.prepared.left_alone,
            dense_ms=setup.prices.dense_ms,
            predicted_ms=ratio * setup.prices.dense_ms,
            predicted_speedup=1 / ratio,
            oracle_loss=loss,
            split={str(part): count for part, count in setup.samples.sizes.items()},
            notes=[setup.samples.description, *setup.samples.notes, *setup.candidates.notes],
        )


@dataclass(frozen=True, slots=True)
class Priced:
    """A model whose sites have their prices, and the device these are of."""

    target: Target
    device: Device
    prepared: Prepared
    prices: Prices


def price_model(request: Request, *, progress: Progress) -> Priced:
    """The prices of a model's sites on the target; what its table lacks is measured."""
    with _one_thread():
        clock = Clock(progress)
        target, device = _open(request)
        source, request = _load(request, clock)
        prepared = _prepare(source, request, clock)
        if request.runtime == AUTO:
            target, device, _ = faster_runtime(prepared, request, target, clock)
        return Priced(target, device, prepared, _price(prepared, request, target, device, clock))


def price_on_boards(
    requests: Sequence[Request], *, progress: Progress, progress_of: Callable[[str], Progress]
) -> list[Priced | ZipcError]:
    """The same on several boards at once; `requests` differ in their board alone.

    What becomes of a board that fails is its error; the others go on. What is done on a board is
    told to the `progress_of` its host.
    """
    with _one_thread():
        clock = Clock(progress)
        opened = dict(zip(requests, beside(_open, requests), strict=True))
        unreached = [found for found in opened.values() if isinstance(found, ZipcError)]
        if len(unreached) == len(requests):
            return [*unreached]
        source, settled = _load(requests[0], clock)
        prepared = _prepare(source, settled, clock)
        turns: defaultdict[str, Lock] = defaultdict(Lock)  # two names of one machine wait in line

        def price_on(request: Request) -> Priced:
            found = opened[request]
            if isinstance(found, ZipcError):
                raise found
            target, device = found
            own = replace(settled, host=request.host, host_python=request.host_python)
            told, copy = Clock(progress_of(str(request.host))), replace(prepared)
            with turns[device.fingerprint()["machine"]]:
                if own.runtime == AUTO:
                    target, device, _ = faster_runtime(copy, own, target, told)
                return Priced(target, device, copy, _price(copy, own, target, device, told))

        return beside(price_on, requests)


@dataclass(slots=True)
class Setup:
    """All that is known before the first candidate is scored."""

    request: Request  # with every size filled in
    target: Target
    device: Device
    samples: Samples
    prepared: Prepared
    prices: Prices
    candidates: Candidates


def _set_up(request: Request, progress: Progress) -> Setup:
    kind_of(request)
    if request.recover != "none":
        raise UsageError(f"--recover {request.recover} is not available; the only choice is none.")
    target, device = _open(request)
    effort = effort_of(request.effort)
    cache = _cache(request)
    source, request = _load(request, progress)
    samples = open_samples(source, request)
    for line in (f"data: {samples.description}", *samples.notes):
        progress.info(line)
    prepared = _prepare(source, request, progress)
    told = []
    if request.runtime == AUTO:
        target, device, note = faster_runtime(prepared, request, target, progress)
        told = [note]
    prices = _price(prepared, request, target, device, progress)
    candidates = gather(
        prepared,
        prices,
        target,
        samples,
        request,
        effort=effort,
        cache=cache,
        progress=progress,
    )
    _tell_discarded(cache, progress)
    for note in candidates.notes:
        progress.info(note)
    candidates.notes += told
    return Setup(request, target, device, samples, prepared, prices, candidates)


def _open(request: Request) -> tuple[Target, Device]:
    """The target and its device, if they can do what is asked.

    Raises:
        RemoteError: the board cannot be reached.
        UsageError: two wishes contradict each other, or there are not as many processors.
    """
    target = requested_target(request)
    if request.engine is not None and target.sheet is not None:
        choose_builder(request.engine, target.sheet.sm)
    device = open_device(target, request.host, python=request.host_python)
    if request.runtime == AUTO:
        for name in ON_CPU:  # one that is missing is told before anything is loaded
            open_device(on_runtime(target, name), request.host, python=request.host_python)
    if request.quantizer == "modelopt":
        check_modelopt(weight_limit(device.fingerprint()))
    processors = device.fingerprint().get("cores", request.threads)
    if request.threads > processors:
        raise UsageError(
            f"--threads {request.threads} is more than the {processors} processors of "
            f"{request.host or 'this machine'}."
        )
    return target, device


def _load(request: Request, progress: Progress) -> tuple[SourceModel, Request]:
    progress.stage("load model")
    source = load_source(request.model, weights=request.weights, input_shapes=request.input_shapes)
    if request.phase == "decode":
        source = with_cache(source)
    progress.done(type(source.module).__name__)
    for note in source.notes:
        progress.info(note)
    return source, settle(request, source)


def _prepare(source: SourceModel, request: Request, progress: Progress) -> Prepared:
    cache = _cache(request)
    prepared = prepare(source, request, cache=cache, progress=progress)
    _tell_discarded(cache, progress)
    return prepared


def _price(
    prepared: Prepared, request: Request, target: Target, device: Device, progress: Progress
) -> Prices:
    prepared.floats, prepared.runtime = target.reference_numeric, runtime_of(target)
    prepared.body = _body(prepared, request, target, device, progress)
    store = TableStore(_cache_root(request) / "tables")
    return price(prepared, target, request, device=device, store=store, progress=progress)


def _body(
    prepared: Prepared, request: Request, target: Target, device: Device, progress: Progress
) -> IntegerBody | None:
    """INT8 for the whole network, where it has convolutions to cut, may run in it, and gains.

    Sites of linear maps alone choose their numeric one by one: see `candidates`. ONNX Runtime's
    quantiser writes the graph, with unsigned activations: TensorRT would not take it.
    """
    kinds = {site.kind for site in prepared.structure.sites}
    wanted = request.numerics in ("auto", "int8", STATIC) and STATIC in target.numerics
    if "channels" not in kinds or "heads" in kinds or not wanted or target.signed:
        return None
    if request.quantizer != "zipc":
        raise UsageError(
            f"--quantizer {request.quantizer} is for linear maps, and {request.model} is brought "
            "to INT8 with its convolutions as a whole. Leave it out."
        )
    progress.stage("whole network in INT8")
    body = IntegerBody(
        request.workload,
        reduce_range=weight_limit(device.fingerprint()) < FULL,
        row_bytes=prepared.dense.row_bytes() if BATCH in prepared.source.axes else 0,
    )
    dense = dense_model(prepared)
    timer = device.timer()
    runners = [timer.load(m, workload=request.workload) for m in (dense, body.emit(dense))]
    speedup = paired_speedup(*runners, pairs=BODY_PAIRS).speedup
    doubt = device.doubt(dense, request.workload)
    least = BODY_GAIN if doubt is None else math.exp(doubt.reach(["int8"]))
    pays = speedup >= least or request.numerics != "auto"
    progress.done(f"{speedup:.2f}x unpruned{'' if pays else ': not used'}")
    return body if pays else None


def _tell_discarded(cache: StageCache, progress: Progress) -> None:
    for entry in cache.discarded:
        progress.info(f"damaged cache entry {entry} was thrown away")


def target_speedup(request: Request, reference: Runner) -> float | None:
    """The speedup asked for; a latency is turned into one by timing the reference now.

    Raises:
        UsageError: neither is given, or the dense model already meets the latency.
    """
    if request.latency_ms is not None:
        warm_up(reference)
        dense_ms = float(np.median([reference.run() for _ in range(40)]))
        if dense_ms <= request.latency_ms:
            raise UsageError(
                f"The dense model already takes {dense_ms:.2f} ms, less than the "
                f"{request.latency_ms:g} ms asked for. Ask for less, or give --speedup."
            )
        return dense_ms / request.latency_ms
    if request.speedup is not None:
        if not request.speedup > 1:
            raise UsageError(f"--speedup must be more than 1, not {request.speedup:g}.")
        return request.speedup
    if not request.prune:
        return None
    raise UsageError(
        "Give a goal: --speedup 2x or --latency 5ms (or --no-prune for numerics only)."
    )


def _output(request: Request) -> Path:
    if request.output is None:
        raise UsageError("-o OUT is needed: the folder for the result.")
    check_output(request.output)
    return request.output


def _cache_root(request: Request) -> Path:
    return request.cache_dir or default_cache_dir()


def _cache(request: Request) -> StageCache:
    return StageCache(_cache_root(request))


class _one_thread:
    """Torch on one thread: two spinning threads on a busy machine are slower than one."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


class Clock:
    """Passes progress on and remembers how long each stage took."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}
        self._name, self._started = "", 0.0

    def stage(self, name: str, total: int | None = None) -> None:
        self._name, self._started = name, time.monotonic()
        self._progress.stage(name, total)

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.advance(steps, note)

    def info(self, message: str) -> None:
        self._progress.info(message)

    def done(self, note: str = "") -> None:
        spent = time.monotonic() - self._started
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + spent
        release()
        self._progress.done(note)
