"""The pipeline. `compile_model` is zipc on one screen: each line takes and returns named types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zipc.build import checkpoint, dense_model
from zipc.clock import Clock, one_thread
from zipc.closed_loop import FINALISTS, ClosedLoop, Found, choose, make_problem
from zipc.core.engine_options import EngineOptions
from zipc.core.errors import UsageError
from zipc.core.figures import three_digits
from zipc.core.request import Request
from zipc.core.types import Allocation, LeftAlone, PairedTiming, Progress, Runner, Site, Target
from zipc.effort import effort_of
from zipc.engines import noted
from zipc.exporters.tensorrt.engine import Engine, build_engine, choose_builder
from zipc.exporters.tensorrt.script import build_script
from zipc.groundwork import Setup, set_up
from zipc.manifest import Manifest
from zipc.modelled_device import predicted_timing
from zipc.output import check_output, staged, write_artifacts
from zipc.profiler.device import TimedGraph
from zipc.profiler.timing import warm_up
from zipc.proof import default_pairs, prove
from zipc.record import make_manifest, read_quality, samples_of
from zipc.shipped import Shipped, layout, reference, ship
from zipc.stage_cache import cache_of, cache_root
from zipc.within_drop import fastest_within

LEAST_MORE, MOST_MORE = 1.01, 1.05  # asked for each time that an artifact was too slow
ELSEWHERE = "Free some space or choose another folder with -o; finished stages are kept."
MOST_AGAIN = 3  # searches after the first


def compile_model(request: Request, *, progress: Progress) -> Manifest:
    """Take a model to an artifact whose speedup has been measured, and write the output folder.

    Raises:
        ZipcError: see `core.errors`; a missed or inconclusive verdict is not an error but a result.
    """
    out = _output(request)
    with one_thread():
        clock, cache = Clock(progress), cache_of(request)
        setup = set_up(request, clock)
        request = setup.request
        measured = setup.device.kind == "measured"
        batches = [setup.prepared.for_graph(b) for b in setup.candidates.repair]
        dense = reference(setup.prepared, target=setup.target, batches=batches)
        shipping = partial(
            ship,
            setup.prepared,
            dense=dense,
            target=setup.target,
            workload=request.workload,
            batches=batches,
        )
        loop = ClosedLoop(
            setup.prepared,
            setup.prices,
            setup.candidates,
            request,
            device=setup.device,
            dense=dense if measured else dense_model(setup.prepared),
            deployed=partial(shipping, placed=True)
            if measured
            else lambda built: Shipped(built.model, dense),
            effort=effort_of(request.effort),
            cache=cache,
            progress=clock,
        )
        goal = target = target_speedup(request, loop.reference)
        if request.max_drop is not None:
            within = fastest_within(
                loop,
                shipping,
                setup.samples,
                request.max_drop,
                runtime=setup.target.runtime,
            )
            target = within.speedup
            setup.candidates.notes.append(f"--max-drop: {within.told}")
        proof = _proved(loop, target)
        if goal is not None and measured:
            proof, told = _proved_again(loop, goal, proof)
            setup.candidates.notes += told
        found, timing = proof.found, proof.timing
        setup.candidates.notes += [
            n for n in setup.device.notes if n not in setup.prices.table.notes
        ]
        structure, tensors, _ = checkpoint(
            setup.prepared, found.built.allocation, found.built.states
        )
        shipped = shipping(found.built, placed=request.engine is not None)
        setup.candidates.notes += shipped.notes
        engine = _engine(setup.target, shipped, request, clock)
        if engine is not None:
            setup.candidates.notes.append(str(engine))
        clock.stage("quality on test")
        quality = read_quality(
            setup.samples,
            dense=shipped.reference,
            compiled=shipped.model,
            runtime=setup.target.runtime,
            seed=request.seed,
        )
        clock.done()
        with staged(out, advice=ELSEWHERE) as folder:
            files = write_artifacts(
                folder,
                model=shipped.model,
                reference=shipped.reference if request.keep_reference else None,
                engine=None if engine is None else engine.plan,
                script=_script(setup, shipped, proof, request),
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
                by_default=proof.by_default,
                fingerprint=setup.device.fingerprint(),
                quality=quality,
                sizes=(len(shipped.reference), len(shipped.model)),
                tensors=tensors,
                session_options=proof.compiled.session_options,
                files=files,
                seconds=clock.seconds,
            )
            manifest.write(folder)
        if manifest.verdict == "missed":
            loop.forget(target)
    return manifest


@dataclass(frozen=True, slots=True)
class _Proof:
    """An artifact, and the measurement, or prediction, that its verdict is read from."""

    found: Found
    compiled: TimedGraph
    timing: PairedTiming
    by_default: PairedTiming | None = None  # the same under the runtime's default options

    def lacks(self, goal: float, request: Request) -> float:
        """By what factor it is too slow for its goal; 1 and less where that is proved."""
        short = goal / self.timing.ci95[0]
        free = self.slow(goal, request)
        return short if free is None else max(short, goal / free.speedup)

    def slow(self, goal: float, request: Request) -> PairedTiming | None:
        """The timing under default options, where that is below the goal."""
        free = self.by_default if request.by_default else None
        return None if free is None or free.speedup >= goal else free


def _proved(loop: ClosedLoop, goal: float | None) -> _Proof:
    found = loop.find(goal)
    shipped = loop.deployed(found.built)
    workload = loop.request.workload
    if loop.prices.doubt is not None:
        compiled = loop.timer.load(shipped.model, workload=workload)
        allocation, doubt = found.built.allocation, loop.prices.doubt
        timing = predicted_timing(loop.reference, compiled, allocation, doubt)
        return _Proof(found, compiled, timing)
    pairs = min(default_pairs(loop.prices.dense_ms), loop.effort.verdict_pairs)
    timing, compiled = prove(
        loop.device,
        loop.dense,
        shipped.model,
        workload=workload,
        pairs=pairs,
        progress=loop.progress,
    )
    timing = noted(timing, compiled, shipped)
    return _Proof(found, compiled, timing, loop.by_default(shipped.model, enough=goal or 0.0))


def _proved_again(loop: ClosedLoop, goal: float, proof: _Proof) -> tuple[_Proof, list[str]]:
    """Search for more while an artifact is too slow for its goal; the proof that lacks least, and
    what is to be told of the others.

    What looks and proofs have shown of the model by then stays with the loop.
    """
    request, more, told = loop.request, 1.0, list[str]()
    best = last = proof
    for _ in range(MOST_AGAIN):
        lacks = last.lacks(goal, request)
        if lacks <= 1 or last.found.solution.unreachable:
            break
        more *= min(max(lacks, LEAST_MORE), MOST_MORE)
        free = last.slow(goal, request)
        measured = f"{last.timing.speedup:.3f}x" + (
            f", {free.speedup:.3f}x by default" if free else ""
        )
        said = f"an artifact measured {measured}: searched for {more - 1:.1%} more"
        loop.progress.info(said)
        loop.forget(goal)
        last = _proved(loop, goal * more)
        if last.found.solution.unreachable:
            break
        told.append(said)
        best = min(best, last, key=lambda p: p.lacks(goal, request))
    return best, told


def _script(setup: Setup, shipped: Shipped, proof: _Proof, request: Request) -> str | None:
    """What builds the engines on the device, of targets that need one."""
    if setup.target.runtime != "tensorrt":
        return None
    timing, host = proof.timing, setup.device.fingerprint().get("host")
    ms = proof.found.solution.predicted_ratio * setup.prices.dense_ms
    return build_script(
        shipped.model,
        target=setup.target,
        workload=request.workload,
        timing=timing,
        ms=float(np.median(timing.candidate_ms)) if timing.candidate_ms else ms,
        known="Predicted" if host is None else f"Measured on {host}",
        options=EngineOptions.parse(request.engine_options),
    )


def _engine(target: Target, shipped: Shipped, request: Request, clock: Clock) -> Engine | None:
    """The engine that was asked for, for the GPU of the target."""
    if request.engine is None:
        return None
    assert target.sheet is not None
    options = EngineOptions.parse(request.engine_options)
    clock.stage("engine")
    built = build_engine(
        shipped.model,
        builder=choose_builder(request.engine, target.sheet.sm, options),
        compute_capability=target.sheet.sm,
        workload=request.workload,
        options=options,
        places=shipped.places,
        cache=cache_root(request) / "tensorrt",
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
    data: str  # where the rows are from, and how they were cut
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
            "data": self.data,
            "notes": self.notes,
        }


def plan_model(request: Request, *, progress: Progress) -> Plan:
    """Everything up to the allocation.

    Raises:
        TargetUnreachable: no allocation meets the request; carries the best speedup.
    """
    with one_thread():
        clock = Clock(progress)
        setup = set_up(request, clock)
        request = setup.request
        reference = setup.device.timer().load(
            dense_model(setup.prepared), workload=request.workload
        )
        goal = target_speedup(request, reference)
        problem = make_problem(
            setup.prepared, setup.prices, setup.candidates, request, cache_of(request), clock
        )
        effort = effort_of(request.effort)
        if goal is None:
            allocation = problem.allocation([int(t.argmin()) for t in problem.times])
            loss = setup.candidates.confirm.score(allocation)
        else:
            finalists, _ = choose(
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
            allocation, loss = finalists[0]
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
            data=setup.samples.description,
            notes=[*setup.samples.notes, *setup.candidates.notes],
        )


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
                f"The dense model already takes {three_digits(dense_ms)} ms, less than the "
                f"{request.latency_ms:g} ms asked for. Ask for less, or give --speedup."
            )
        return dense_ms / request.latency_ms
    if request.speedup is not None:
        if not request.speedup > 1:
            raise UsageError(f"--speedup must be more than 1, not {request.speedup:g}.")
        return request.speedup
    if request.max_drop is not None or not request.prune:
        return None
    raise UsageError(
        "Give a goal: --speedup 2x, --latency 5ms or --max-drop 0.5 (or --no-prune for numerics "
        "only)."
    )


def _output(request: Request) -> Path:
    if request.output is None:
        raise UsageError("-o OUT is needed: the folder for the result.")
    check_output(request.output)
    return request.output
