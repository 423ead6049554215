"""What is told beside the verdict: graphs timed in turns, each in a process of its own.

Idle threads of one may spin, and would take the processors of another that runs beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from zipc.core.request import Request
from zipc.core.types import PairedTiming, Progress, Runner, Target, Workload
from zipc.devices import open_device
from zipc.exporters.specialise import Edit, specialise
from zipc.prepare import Prepared
from zipc.profiler.device import Device
from zipc.profiler.timing import interleave, warm_up
from zipc.proof import paired_timing
from zipc.runtimes import RUNTIMES, runtime_of
from zipc.targets import ON_CPU, on_runtime

TURNS, RUNS = 6, 8


def by_default(
    device: Device, models: Sequence[bytes], workload: Workload, target: Target, progress: Progress
) -> str:
    """What the speedup of the second model over the first is with as many threads as the runtime
    takes by itself."""
    progress.stage("default session options")
    free = replace(workload, threads=0)
    timing = in_turns([device.timer().load(model, workload=free) for model in models])
    low, high = timing.ci95
    told = f"{timing.speedup:.2f}x [{low:.2f}, {high:.2f}]"
    progress.done(told)
    processors = device.fingerprint()["cores"]
    title = runtime_of(target).title
    but = ", but in fp32" if target.runtime == "openvino" else ""
    return f"under {title}'s default options{but} ({processors} processors): {told}"


def faster_runtime(
    prepared: Prepared, request: Request, target: Target, progress: Progress
) -> tuple[Target, Device, str]:
    """The target under the runtime that is faster on the dense model, and what was measured."""
    progress.stage("choose a runtime")
    targets = [on_runtime(target, name) for name in ON_CPU]
    devices = [open_device(t, request.host, python=request.host_python) for t in targets]
    runners = []
    for name, device in zip(ON_CPU, devices, strict=True):
        dense = specialise(prepared.dense, Edit(), emitter=RUNTIMES[name].emitter).to_bytes()
        runners.append(device.timer().load(dense, workload=request.workload))
    timing = in_turns(runners)
    times = [float(np.median(t)) for t in (timing.reference_ms, timing.candidate_ms)]
    chosen = int(np.argmin(times))
    told = ", ".join(
        f"{RUNTIMES[name].title} {ms:.2f} ms" for name, ms in zip(ON_CPU, times, strict=True)
    )
    note = f"runtime {ON_CPU[chosen]}, the faster one on the dense model: {told}"
    progress.done(note)
    return targets[chosen], devices[chosen], note


def in_turns(runners: Sequence[Runner]) -> PairedTiming:
    """The speedup of the second of two runners over the first."""
    samples: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for runner, held in zip(runners, samples, strict=True):
            warm_up(runner, max_runs=RUNS)
            held += interleave([runner], rounds=RUNS)[0]
    return paired_timing(*samples)
