"""What a compile found, as the manifest records it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from zipc.candidates import Candidates
from zipc.closed_loop import Found, Solution
from zipc.core.request import Request
from zipc.core.types import Artifact, PairedTiming, Target, VerdictName, Workload
from zipc.core.workload import workload_document
from zipc.manifest import (
    AllocationRecord,
    ByDefaultRecord,
    DataRecord,
    LatencyRecord,
    Manifest,
    ModelRecord,
    QualityRecord,
    RequestRecord,
    SizeRecord,
)
from zipc.metrics import paired_bootstrap
from zipc.prepare import Prepared
from zipc.prices import Prices
from zipc.proof import percentiles, verdict
from zipc.samples import Samples

MB = 1e6


def read_quality(
    samples: Samples, *, dense: bytes, compiled: bytes, runtime: str, seed: int
) -> QualityRecord:
    """Read the metric from both ONNX files on the test rows: the only place that reads them."""
    before, after = samples.compare(dense, compiled, "test", runtime=runtime)
    interval = paired_bootstrap(
        before.per_row, after.per_row, metric=samples.metric, n=1000, seed=seed
    )
    return QualityRecord(
        metric=samples.metric,
        split="test",
        dense=before.value,
        compiled=after.value,
        one_shot=after.value,
        interval=interval,
        rows=after.n,
        batch_deviation=samples.deviation(compiled, "test", runtime=runtime),
        notes=samples.notes,
    )


def samples_of(timing: PairedTiming, workload: Workload) -> dict[str, Any]:
    """Raw samples of the verdict, in the order they were taken; each load has as many."""
    return {
        "schema_version": 1,
        "unit": "ms",
        "loads": timing.loads,
        **workload_document(workload),
        "reference_ms": [round(t, 5) for t in timing.reference_ms],
        "compiled_ms": [round(t, 5) for t in timing.candidate_ms],
    }


def make_manifest(
    request: Request,
    *,
    goal: float | None,
    target: Target,
    prepared: Prepared,
    prices: Prices,
    candidates: Candidates,
    samples: Samples,
    found: Found,
    timing: PairedTiming,
    by_default: PairedTiming | None,
    fingerprint: Mapping[str, Any],
    quality: QualityRecord,
    sizes: tuple[int, int],
    tensors: Mapping[str, Tensor],
    session_options: Mapping[str, Any],
    files: tuple[Artifact, ...],
    seconds: Mapping[str, float],
) -> Manifest:
    """Put the record together; verdict and figures come from `timing` alone, on the device of the
    `fingerprint`."""
    source = prepared.source
    allocation = found.built.allocation
    sweeps = candidates.levels.sweeps
    notes = [*timing.notes, *prices.table.notes, *candidates.notes]
    solution = found.solution
    if solution.unreachable:
        notes.append(solution.unreachable)
    if found.built.sparse_weights:
        notes.append(f"{found.built.sparse_weights} weights of model.onnx are in the 2:4 pattern")
    parameters = sum(p.numel() for p in source.module.parameters()), _parameters(tensors)
    if parameters[1] > parameters[0]:
        notes.append(
            "there are more parameters than before: a rounded map no longer shares those of an "
            "embedding"
        )
    notes.append(f"{solution.searched} candidates scored; {len(solution.looks)} builds looked at")
    return Manifest(
        target=target.name,
        runtime=target.runtime,
        workload=request.workload,
        model=ModelRecord(source=source.source, sha256=source.sha256, revision=source.revision),
        request=RequestRecord.of(request),
        allocation=tuple(
            AllocationRecord(
                site=name,
                level=level.within(prepared.numeric),
                units=prepared.sites[name].units,
                predicted_ms=prices.ms(name, level),
                error=sweeps[name].errors[prepared.sites[name].units - level.width],
            )
            for name, level in allocation.levels.items()
        ),
        left_alone=tuple(prepared.left_alone),
        latency=_latency(
            *(prices, solution, timing, by_default, fingerprint, session_options, notes),
            request=request,
        ),
        verdict=_verdict(timing, by_default if request.by_default else None, goal, found, prices),
        quality=quality,
        size=SizeRecord(
            dense_mb=sizes[0] / MB,
            compiled_mb=sizes[1] / MB,
            dense_params=parameters[0],
            compiled_params=parameters[1],
        ),
        data=DataRecord(
            source=str(request.data).rpartition("/")[2] or str(request.data),
            sha256=samples.sha256,
            rows={str(part): count for part, count in samples.sizes.items()},
            description=samples.description,
        ),
        files=files,
        timings_s=dict(seconds),
        stage_keys={"export": prepared.key, "evidence": candidates.key},
        seed=request.seed,
        versions=_versions(),
    )


def _latency(
    prices: Prices,
    solution: Solution,
    timing: PairedTiming,
    by_default: PairedTiming | None,
    fingerprint: Mapping[str, Any],
    session_options: Mapping[str, Any],
    notes: list[str],
    *,
    request: Request,
) -> LatencyRecord:
    """Times are null where they come from a model: nothing was measured."""
    record = LatencyRecord(
        table_kind=prices.table.kind,
        predicted_ms=solution.predicted_ratio * prices.dense_ms,
        speedup=timing.speedup,
        speedup_ci95=timing.ci95,
        by_default=by_default_record(by_default, fingerprint, promised=request.by_default),
        fingerprint=dict(fingerprint),
        session_options=dict(session_options),
        notes=tuple(notes),
    )
    if prices.doubt is not None:
        return record
    error = solution.predicted_ratio * timing.speedup - 1
    times = times_of(timing, runtime=prices.table.runtime, asked=request.runtime)
    return record.model_copy(update={**times, "prediction_error": error})


def times_of(timing: PairedTiming, *, runtime: str, asked: str | None) -> dict[str, Any]:
    """The fields of a `LatencyRecord` that a measurement gives.

    Whether the dense model is the fastest of the device is known of ONNX Runtime, and of others
    where `asked` was for the faster one.
    """
    times = percentiles(timing.candidate_ms)
    fastest = runtime in ("onnxruntime", "tensorrt") or asked == "auto"
    return {
        "reference_ms": float(np.median(timing.reference_ms)),
        "compiled_ms": times["p50"],
        "p90_ms": times["p90"],
        "p99_ms": times["p99"],
        "speedup": timing.speedup,
        "speedup_ci95": timing.ci95,
        "speedup_vs_best_dense": timing.speedup if fastest else None,
        "pairs": len(timing.candidate_ms),
    }


def by_default_record(
    timing: PairedTiming | None, fingerprint: Mapping[str, Any], *, promised: bool
) -> ByDefaultRecord | None:
    """What a manifest says of a timing under default options on the device of a fingerprint."""
    if timing is None:
        return None
    return ByDefaultRecord(
        speedup=timing.speedup,
        speedup_ci95=timing.ci95,
        processors=int(fingerprint["cores"]),
        promised=promised,
    )


def _verdict(
    timing: PairedTiming,
    by_default: PairedTiming | None,
    goal: float | None,
    found: Found,
    prices: Prices,
) -> VerdictName:
    if prices.doubt is not None:
        short = goal is not None and timing.speedup < goal
        return "missed" if short or found.solution.unreachable else "predicted"
    says = verdict(timing, goal if goal is not None else 1.0, by_default=by_default)
    return "missed" if found.solution.unreachable and says != "validated" else says


def _parameters(tensors: Mapping[str, Tensor]) -> int:
    helpers = ("weight_scale", "input_scale", "input_zero_point")
    return sum(t.numel() for n, t in tensors.items() if not n.endswith(helpers))


def _versions() -> dict[str, str]:
    names = (
        "zipc",
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "openvino",
        "numpy",
    )
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an uninstalled checkout
            continue
    return found
