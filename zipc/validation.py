"""Measure a finished compile again, here or on a board, and let its manifest say what came out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from zipc.core.errors import CorruptFile
from zipc.core.files import sha256_file, write_json
from zipc.core.types import Artifact, Progress
from zipc.manifest import LatencyRecord, Manifest
from zipc.output import KINDS, staged
from zipc.profiler.device import Device
from zipc.proof import BenchResult, bench
from zipc.record import samples_of, times_of

SAMPLES = "samples.json"
OF_A_TIMING = re.compile(r"\d+ pairs in |too noisy: |under [A-Za-z ]+'s default options")


def validate(
    out: Path, *, device: Device, pairs: int | None = None, progress: Progress | None = None
) -> Manifest:
    """Repeat the proof of OUT on a device; its verdict, times and samples replace those of OUT.

    Everything is written beside OUT first and takes its place at once. The promise is that of
    `bench`.

    Raises:
        CorruptFile: a file of OUT is not the one that the manifest describes.
        UsageError: OUT was made for a device that only a model knows, or lacks a graph.
        NoisyMeasurement, RemoteError: see `bench`.
    """
    manifest = Manifest.read(out)
    changed = manifest.changed_files(out)
    if changed:
        raise CorruptFile(
            f"{out}: {', '.join(changed)} changed since the compile, or is missing. Compile again."
        )
    result = bench(out, pairs=pairs, progress=progress, device=device)
    with staged(out) as folder:
        shutil.copytree(out, folder, dirs_exist_ok=True)
        write_json(folder / SAMPLES, samples_of(result.timing, result.workload))
        artifact = Artifact(SAMPLES, KINDS[SAMPLES], sha256_file(folder / SAMPLES))
        made = manifest.model_copy(
            update={
                "verdict": result.verdict,
                "latency": _measured(manifest, result, device),
                "files": (*(f for f in manifest.files if f.path != SAMPLES), artifact),
            }
        )
        made.write(folder)
    return made


def _measured(manifest: Manifest, result: BenchResult, device: Device) -> LatencyRecord:
    before, asked = manifest.latency, (manifest.request.model_extra or {}).get("runtime")
    timing, prints = result.timing, device.fingerprint()
    place = prints.get("host", "this machine")
    told = f"validated again on {place}; before: {result.recorded_speedup:.3f}x"
    kept = [n for n in before.notes if not OF_A_TIMING.match(n) and not n.startswith("validated ")]
    error = before.prediction_error
    if error is not None:
        error = (error + 1) * timing.speedup / result.recorded_speedup - 1
    return before.model_copy(
        update={
            **times_of(timing, runtime=manifest.runtime, asked=asked),
            "prediction_error": error,
            "fingerprint": prints,
            "session_options": dict(result.session_options),
            "notes": (*timing.notes, told, *device.notes, *kept),
        }
    )
