"""The proof of a finished compile, repeated: what `zipc bench` and `zipc validate` measure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zipc.core.errors import CorruptFile, UsageError
from zipc.core.files import read_json
from zipc.core.types import Artifact, PairedTiming, Progress, Silent, VerdictName, Workload
from zipc.core.workload import read_workload, workload_document
from zipc.devices import refuse_other_gpu
from zipc.engines import noted
from zipc.manifest import TENSORRT, latency_of, recorded_runtime, refuse_changed
from zipc.profiler.device import Device, LocalDevice, local_device
from zipc.profiler.facts import machine
from zipc.profiler.remote import RemoteDevice
from zipc.proof import MIN_PAIRS, of_builds, percentiles, prove, verdict
from zipc.shipped import Shipped
from zipc.targets import load_target
from zipc.turns import by_default

GRAPHS = ("reference.onnx", "model.onnx")


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A repeated proof, beside what the manifest promised."""

    out: str
    workload: Workload
    promised_speedup: float  # what has to be met here
    recorded_speedup: float  # what the manifest has: measured or predicted before
    timing: PairedTiming
    by_default: PairedTiming | None  # where the promise is for the runtime's default options too
    verdict: VerdictName
    session_options: Mapping[str, Any]
    fingerprint: Mapping[str, Any]  # of the device
    states: tuple[Mapping[str, Any], Mapping[str, Any]]  # its clocks and heat before and after

    @property
    def holds(self) -> bool:
        return self.verdict == "validated"

    @property
    def exit_code(self) -> int:
        return {"validated": 0, "missed": 1}.get(self.verdict, 3)

    @property
    def state(self) -> dict[str, Any]:
        before, after = self.states
        return {"before": dict(before), "after": dict(after)}

    def to_json(self) -> dict[str, Any]:
        """Return a document for `--format json`; raw samples included."""
        timing = self.timing
        return {
            "out": self.out,
            "workload": workload_document(self.workload),
            "promised_speedup": self.promised_speedup,
            "recorded_speedup": self.recorded_speedup,
            "speedup": timing.speedup,
            "speedup_ci95": list(timing.ci95),
            "by_default": None
            if self.by_default is None
            else {"speedup": self.by_default.speedup, "speedup_ci95": list(self.by_default.ci95)},
            "pairs": len(timing.reference_ms),
            "reference_ms": percentiles(timing.reference_ms),
            "compiled_ms": percentiles(timing.candidate_ms),
            "verdict": self.verdict,
            "holds": self.holds,
            "notes": list(timing.notes),
            "session_options": dict(self.session_options),
            "device": dict(self.fingerprint),
            "state": self.state,
            "samples_ms": {
                "reference": list(timing.reference_ms),
                "compiled": list(timing.candidate_ms),
            },
        }


@dataclass(frozen=True, slots=True)
class Promise:
    """What a manifest says that the artifact reaches."""

    figure: float  # a speedup, or milliseconds
    of_latency: bool
    asked: bool  # for: otherwise it is the lower end of the recorded interval

    def speedup(self, reference_ms: float) -> float:
        """The least speedup over a reference that takes so many milliseconds."""
        return reference_ms / self.figure if self.of_latency else self.figure


def bench(
    out: Path,
    *,
    pairs: int | None = None,
    builds: int = 1,
    progress: Progress | None = None,
    threads: int | None = None,
    device: Device | None = None,
) -> BenchResult:
    """Measure OUT/model.onnx against OUT/reference.onnx again and judge the manifest's promise.

    The promise is the requested speedup, on the workload and, where the manifest says so, under the
    runtime's default options; where a latency was requested, that latency. Where neither was, the
    lower end of the recorded interval, below which the new one must not lie as a whole. Without a
    `device`, it is this machine under the runtime of the manifest. Of `builds` engines of each
    graph, which differ by luck, each has its share of the pairs.

    Raises:
        UsageError: a file of the folder is missing, or the proof is that of another device.
        CorruptFile: the manifest is truncated or lacks a field, or a graph is not the one that it
            describes.
        NoisyMeasurement: the clock gave something that is not a positive time.
        EngineFailed: TensorRT refuses a graph.
        RemoteError: the device cannot be reached, or lacks what it needs.
    """
    if device is None or isinstance(device, LocalDevice):
        manifest = _manifest(out)
        refuse_elsewhere(manifest, out)
        device = device or local_device(recorded_runtime(manifest))
    return measure(
        out, pairs=pairs, builds=builds, progress=progress, threads=threads, device=device
    )


def measure(
    out: Path,
    *,
    device: Device,
    pairs: int | None = None,
    builds: int = 1,
    progress: Progress | None = None,
    threads: int | None = None,
) -> BenchResult:
    """The same on any device that runs the graphs, wherever they were measured before."""
    manifest = _manifest(out)
    path = out / "manifest.json"
    workload = recorded_workload(manifest, path=path)
    if threads is not None:
        workload = replace(workload, threads=threads)
    recorded = _recorded(manifest, path=path)
    _refuse_runtime(manifest, out, runtime=device.runtime)
    promise = _promise(manifest, path=path)
    refuse_changed(_graphs(manifest, path=path), out)
    if device.runtime == TENSORRT:
        _refuse_gpu(manifest, device)
    progress = progress or Silent()
    before = device.state()
    reference, compiled = ((out / name).read_bytes() for name in GRAPHS)
    share = None if pairs is None else max(pairs // builds, MIN_PAIRS)
    timings = []
    for turn in _builders(device, builds):
        timing, candidate = prove(
            turn, reference, compiled, workload=workload, pairs=share, progress=progress
        )
        timings.append(noted(timing, candidate, Shipped(compiled, reference)))
    timing = of_builds(timings)
    promised = promise.speedup(float(np.median(timing.reference_ms)))
    free = None
    if threads is None and _promised_by_default(manifest):
        free = by_default(device, (reference, compiled), workload, progress)
    if promise.asked:
        found = verdict(timing, promised, by_default=free)
    else:
        found = _repeats(timing, promised)
    return BenchResult(
        out=str(out),
        workload=workload,
        promised_speedup=promised,
        recorded_speedup=recorded,
        timing=timing,
        by_default=free,
        verdict=found,
        session_options=candidate.session_options,
        fingerprint=device.fingerprint(),
        states=(before, device.state()),
    )


def _repeats(timing: PairedTiming, lower: float) -> VerdictName:
    """Whether a speedup that nobody asked for is found again: the interval reaches the lower end of
    the recorded one, above which a second lower end would lie by luck only."""
    if timing.ci95[1] < lower:
        return "missed"
    return "inconclusive" if timing.inconclusive else "validated"


def _builders(device: Device, builds: int) -> Sequence[Device]:
    """The device, for each time that the engines are built there."""
    if builds == 1:
        return [device]
    if builds < 1:
        raise UsageError(f"--builds {builds}: engines are built once or more often.")
    if device.runtime != TENSORRT or not isinstance(device, RemoteDevice):
        raise UsageError(
            f"--builds {builds}: engines of TensorRT, on the board of --host, can be built more "
            "than once. Leave it out."
        )
    return [device.anew(number) for number in range(builds)]


def refuse_elsewhere(manifest: Any, out: Path) -> None:
    """Refuse to time an artifact here that was made for, or measured on, another device.

    Raises:
        UsageError: its latency was predicted, or measured on a board.
    """
    if recorded_runtime(manifest) == TENSORRT:
        raise _not_here(manifest, out)
    prints = latency_of(manifest).get("fingerprint") or {}
    if "host" in prints and prints.get("machine") != machine():
        host = prints["host"]
        raise UsageError(
            f"{out} was measured on {host}, which is not this machine: times taken here say "
            f"nothing about it. Measure it there with zipc bench {out} --host {host}, or make this "
            f"machine its device with zipc validate {out}."
        )


def _refuse_runtime(manifest: Any, out: Path, *, runtime: str) -> None:
    wanted = recorded_runtime(manifest)
    if wanted == runtime:
        return
    if wanted == TENSORRT:
        raise _not_here(manifest, out)
    raise UsageError(f"{out} was made for {wanted}, and times of {runtime} say nothing about it.")


def _refuse_gpu(manifest: Any, device: Device) -> None:
    try:
        target = load_target(str(manifest.get("target")))
    except UsageError:  # the user's own, of another machine: nobody here knows its GPU
        return
    refuse_other_gpu(target, device.fingerprint())


def _not_here(manifest: Any, out: Path) -> UsageError:
    return UsageError(
        f"{out} was made for target '{manifest.get('target')}', which is not this machine: "
        "times taken here say nothing about it. Name the device with --host user@board "
        f"(bench and validate), or run {out}/build.sh there."
    )


def _manifest(out: Path) -> Any:
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder. Give the output folder of a zipc compile.")
    for name, command in (
        ("manifest.json", "Run: zipc compile MODEL ... -o OUT"),
        ("model.onnx", "Run zipc compile again with the same -o."),
        ("reference.onnx", "It is gone, or --no-reference left it out: compile again."),
    ):
        if not (out / name).is_file():
            raise UsageError(f"{out} has no {name}, which the measurement needs. {command}")
    manifest = read_json(out / "manifest.json", advice="Compile again.")
    if not isinstance(manifest, dict):
        raise CorruptFile(f"{out}/manifest.json is no manifest. Compile again.")
    return manifest


def recorded_workload(manifest: Any, *, path: Path) -> Workload:
    """What the graphs of a manifest are timed on.

    Raises:
        CorruptFile: it does not say, or nothing usable.
    """
    try:
        return read_workload(manifest["workload"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} has no usable workload ({error!r}). Compile again.") from error


def _recorded(manifest: Any, *, path: Path) -> float:
    try:
        return float(manifest["latency"]["speedup"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} records no speedup ({error!r}). Compile again.") from error


def _graphs(manifest: Any, *, path: Path) -> list[Artifact]:
    try:
        files = {f["path"]: Artifact(f["path"], f["kind"], f["sha256"]) for f in manifest["files"]}
        return [files[name] for name in GRAPHS]
    except (KeyError, TypeError) as error:
        raise CorruptFile(
            f"{path} does not list both graphs ({error!r}). Compile again."
        ) from error


def _promised_by_default(manifest: Any) -> bool:
    recorded = latency_of(manifest).get("by_default")
    return isinstance(recorded, dict) and recorded.get("promised") is True


def _promise(manifest: Any, *, path: Path) -> Promise:
    try:
        request = manifest["request"]
        asked = [k for k in ("speedup", "latency_ms") if request.get(k) is not None]
        figure = float(request[asked[0]] if asked else manifest["latency"]["speedup_ci95"][0])
        if not 0 < figure < math.inf:
            raise ValueError(f"{figure:g} is not positive")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} promises nothing usable ({error!r}). Compile again.") from error
    return Promise(figure, of_latency=asked[:1] == ["latency_ms"], asked=bool(asked))
