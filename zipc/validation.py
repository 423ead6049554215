"""Measure a finished compile again, here or on a board, and let its manifest say what came out."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from zipc.bench import BenchResult, measure
from zipc.core.files import sha256_file, write_json
from zipc.core.types import Artifact, Progress
from zipc.engines import ENGINE
from zipc.manifest import LatencyRecord, Manifest, refuse_changed
from zipc.output import KINDS, staged
from zipc.profiler.device import Device
from zipc.record import by_default_record, samples_of, times_of

SAMPLES = "samples.json"
OF_A_TIMING = re.compile(
    rf"\d+ (pairs in|builds: )|{ENGINE}|too noisy: |.*; nothing was measured$"
    r"|\S+ became [\d.]+ times slower |the (agent on|connection to) \S+ "
)
OF_THE_COMPILE = "prices and predicted times are those of the compile, for "


def validate(
    out: Path,
    *,
    device: Device,
    pairs: int | None = None,
    builds: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """Repeat the proof of OUT on a device; its verdict, times and samples replace those of OUT.

    Everything is written beside OUT first and takes its place at once. The promise is that of
    `bench`.

    Raises:
        CorruptFile: a file of OUT is not the one that the manifest describes.
        UsageError: the device has another runtime, or OUT lacks a graph.
        EngineFailed, NoisyMeasurement, RemoteError: see `bench`.
    """
    manifest = Manifest.read(out)
    refuse_changed(manifest.files, out)
    result = measure(out, pairs=pairs, builds=builds, progress=progress, device=device)
    with staged(out) as folder:
        shutil.copytree(out, folder, dirs_exist_ok=True)
        samples = samples_of(result.timing, result.workload) | {"state": result.state}
        write_json(folder / SAMPLES, samples)
        kept = (replace(f, kind=KINDS.get(f.path, f.kind)) for f in manifest.files)
        artifact = Artifact(SAMPLES, KINDS[SAMPLES], sha256_file(folder / SAMPLES))
        made = manifest.model_copy(
            update={
                "verdict": result.verdict,
                "latency": _measured(manifest, result, device),
                "files": (*(f for f in kept if f.path != SAMPLES), artifact),
            }
        )
        made.write(folder)
    return made


def _measured(manifest: Manifest, result: BenchResult, device: Device) -> LatencyRecord:
    before, asked = manifest.latency, (manifest.request.model_extra or {}).get("runtime")
    timing, prints = result.timing, dict(result.fingerprint)
    place = prints.get("host", "this machine")
    how = "predicted" if before.reference_ms is None else "measured"
    told = f"validated again on {place}; before: {result.recorded_speedup:.3f}x, {how}"
    kept = [n for n in before.notes if not OF_A_TIMING.match(n) and not n.startswith("validated ")]
    moved = prints != before.fingerprint
    if moved and not any(note.startswith(OF_THE_COMPILE) for note in kept):
        kept.append(f"{OF_THE_COMPILE}{_device_of(manifest)}")
    return before.model_copy(
        update={
            **times_of(timing, runtime=manifest.runtime, asked=asked),
            "by_default": by_default_record(result.by_default, prints, promised=True),
            "prediction_error": _prediction_error(before, result, moved=moved),
            "fingerprint": prints,
            "session_options": dict(result.session_options),
            "notes": (*timing.notes, told, *device.notes, *kept),
        }
    )


def _prediction_error(before: LatencyRecord, result: BenchResult, *, moved: bool) -> float | None:
    """None where the prediction was for another device than the one measured now."""
    error = before.prediction_error
    if before.reference_ms is None:
        error = 0.0  # what is recorded is the prediction itself
    elif moved:
        return None
    if error is None:
        return None
    return (error + 1) * result.timing.speedup / result.recorded_speedup - 1


def _device_of(manifest: Manifest) -> str:
    latency = manifest.latency
    if latency.table_kind == "modelled":
        return f"target '{manifest.target}' by its model"
    return str(latency.fingerprint.get("host") or latency.fingerprint.get("cpu", "another device"))
