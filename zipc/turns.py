"""Graphs timed in turns, each in a process of its own: what is deployed has a whole device.

Idle threads of one may spin on for a while, and take a processor from another that has its turn by
then: with two processors, half of the first runs of a graph of 2.5 ms took 6.6 ms, a tick of the
kernel's scheduler more. So a turn begins with untimed runs until that is over.
"""

from __future__ import annotations

import time
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
from zipc.runtimes import RUNTIMES
from zipc.targets import ON_CPU, SERVING, on_runtime

TURNS, FEWEST_TURNS = 8, 3
SECONDS = 8.0  # after which the fewest turns are enough
UNTIMED_MS, FEWEST_UNTIMED = 200.0, 4  # of a turn, before what is timed
TIMED_MS, FEWEST_TIMED, MOST_TIMED = 150.0, 8, 40  # of the slower graph


def by_default(
    device: Device, models: Sequence[bytes], workload: Workload, progress: Progress
) -> PairedTiming | None:
    """The speedup of the second model over the first with as many threads as the runtime takes by
    itself; None where that is one, or the runtime is no processor's."""
    processors = device.fingerprint().get("cores", 1)
    if processors == 1 or device.runtime not in ON_CPU:
        return None
    progress.stage("default session options")
    free = replace(workload, threads=0)
    timing = in_turns([device.timer().load(model, workload=free) for model in models])
    low, high = timing.ci95
    progress.done(f"{timing.speedup:.2f}x [{low:.2f}, {high:.2f}] on {processors} processors")
    return timing


def faster_runtime(
    prepared: Prepared, request: Request, target: Target, progress: Progress
) -> tuple[Target, Device, str]:
    """The target under the runtime that is faster on the dense model, and what was measured."""
    progress.stage("choose a runtime")
    targets = [on_runtime(target, name) for name in SERVING]
    devices = [open_device(t, request.host, python=request.host_python) for t in targets]
    runners = []
    for name, device in zip(SERVING, devices, strict=True):
        dense = specialise(prepared.dense, Edit(), emitter=RUNTIMES[name].emitter).to_bytes()
        runners.append(device.timer().load(dense, workload=request.workload))
    timing = in_turns(runners)
    times = [float(np.median(t)) for t in (timing.reference_ms, timing.candidate_ms)]
    chosen = int(np.argmin(times))
    told = ", ".join(
        f"{RUNTIMES[name].title} {ms:.2f} ms" for name, ms in zip(SERVING, times, strict=True)
    )
    note = f"runtime {SERVING[chosen]}, the faster one on the dense model: {told}"
    progress.done(note)
    return targets[chosen], devices[chosen], note


def in_turns(runners: Sequence[Runner]) -> PairedTiming:
    """The speedup of the second of two runners over the first, each going at its steady pace."""
    samples: list[list[float]] = [[] for _ in runners]
    paces = [min(warm_up(runner)) for runner in runners]
    timed = min(max(round(TIMED_MS / max(paces)), FEWEST_TIMED), MOST_TIMED)
    started = time.monotonic()
    for turn in range(TURNS):
        for runner, pace, held in zip(runners, paces, samples, strict=True):
            untimed = max(round(UNTIMED_MS / pace), FEWEST_UNTIMED)
            held += interleave([runner], rounds=untimed + timed, untimed=0)[0][untimed:]
        if turn >= FEWEST_TURNS - 1 and time.monotonic() - started > SECONDS:
            break
    return paired_timing(*samples)
