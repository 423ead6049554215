"""The gate at p50:5% cries wolf in at most 2 % of checks and finds a 10 % slower graph in 90 %.

    python benchmarks/bench_gate.py                                # simulated noise, fake clock
    python benchmarks/bench_gate.py --real 100 --model model.onnx  # A/A runs of one graph, too
    python benchmarks/bench_gate.py --proofs 100 --model model.onnx  # and as `zipc bench` does it

Simulated graphs share a machine whose speed wanders and drifts; each has its own autocorrelated
noise and spikes. The 95 % intervals of at least 90 in 100 proofs of a graph against itself have to
hold 1.0. Results go to benchmarks/results/gate.json.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from provenance import commit

from zipc.core.files import read_json, write_json
from zipc.core.types import Workload
from zipc.gate import GateResult, check
from zipc.profiler.device import local_device
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.proof import prove

RESULTS = Path(__file__).parent / "results" / "gate.json"
BASE_MS = 17.0  # MiniLM, batch 1, sequence 128, one thread


@dataclass(frozen=True, slots=True)
class Noise:
    """How a simulated machine misbehaves; standard deviations are of the log of the time."""

    white: float = 0.02
    autocorrelated: float = 0.0  # per graph, does not cancel in the ratio
    rho: float = 0.0  # from one run of a graph to its next
    wander: float = 0.0  # of the machine, common to both graphs
    drift: float = 0.0  # of the machine over a minute
    spikes: float = 0.0  # chance that a run is hit; a hit doubles it on average


MACHINES = {
    "quiet": Noise(),
    "noisy": Noise(white=0.06),
    "autocorrelated": Noise(white=0.02, autocorrelated=0.04, rho=0.9),
    "drifting": Noise(white=0.03, wander=0.1, drift=0.3),
    "spiky": Noise(white=0.03, spikes=0.05),
    "all at once": Noise(
        white=0.03, autocorrelated=0.03, rho=0.8, wander=0.05, drift=0.2, spikes=0.03
    ),
}


class Machine:
    """A clock that the runs of simulated graphs advance."""

    def __init__(self, noise: Noise, rng: np.random.Generator) -> None:
        self.noise, self.rng = noise, rng
        self.now_s = 0.0
        self._wander = 0.0

    def clock(self) -> float:
        return self.now_s

    def slowness(self) -> float:
        """Log of how slow the machine is now; wanders with a memory of some 100 runs."""
        self._wander += -0.01 * self._wander + 0.14 * self.noise.wander * self.rng.normal()
        return self._wander + self.noise.drift * self.now_s / 60

    def graph(self, ms: float) -> SimulatedRunner:
        return SimulatedRunner(self, ms)


class SimulatedRunner:
    """A `Runner` whose true time is known."""

    def __init__(self, machine: Machine, ms: float) -> None:
        self._machine, self._ms = machine, ms
        self._state = machine.noise.autocorrelated * machine.rng.normal()

    def run(self) -> float:
        noise, rng = self._machine.noise, self._machine.rng
        innovation = noise.autocorrelated * math.sqrt(1 - noise.rho**2)
        self._state = noise.rho * self._state + innovation * rng.normal()
        log_ms = self._machine.slowness() + self._state + noise.white * rng.normal()
        ms = self._ms * math.exp(log_ms)
        if rng.random() < noise.spikes:
            ms *= 1 + rng.exponential()
        self._machine.now_s += ms / 1e3
        return ms


def simulate(slowdown: float, *, trials: int, seed: int) -> dict[str, Any]:
    """Check a graph against one that is `slowdown` times faster, on every machine."""
    table: dict[str, Any] = {}
    for index, (name, noise) in enumerate(MACHINES.items()):
        outcomes = []
        for trial in range(trials):
            machine = Machine(noise, np.random.default_rng([seed, index, trial]))
            graphs = machine.graph(BASE_MS * slowdown), machine.graph(BASE_MS)
            outcomes.append(check(Path("new"), Path("base"), runners=graphs, clock=machine.clock))
        table[name] = _summary(outcomes)
    return table


def real(model: Path, *, trials: int, max_time_s: float, workload: Workload) -> dict[str, Any]:
    """Check a graph against itself, in two sessions opened anew for every trial."""
    outcomes = []
    for trial in range(trials):
        runners = (
            OnnxRuntimeRunner(model, workload=workload),
            OnnxRuntimeRunner(model, workload=workload),
        )
        outcomes.append(check(model, model, runners=runners, max_time_s=max_time_s))
        print(f"A/A {trial + 1}/{trials}: {outcomes[-1].status} {outcomes[-1].ratio}", flush=True)
    return {"model": model.name, "workload": workload.key, **_summary(outcomes)}


def proofs(model: Path, *, trials: int, workload: Workload) -> dict[str, Any]:
    """Prove a graph against itself as `zipc bench` does."""
    graph, device, timings = model.read_bytes(), local_device("onnxruntime"), []
    for trial in range(trials):
        timings.append(prove(device, graph, graph, workload=workload)[0])
        speedup, (low, high) = timings[-1].speedup, timings[-1].ci95
        print(f"bench {trial + 1}/{trials}: {speedup:.4f} [{low:.4f}, {high:.4f}]", flush=True)
    return {
        "model": model.name,
        "workload": workload.key,
        "trials": trials,
        "hold_1": sum(t.ci95[0] <= 1.0 <= t.ci95[1] for t in timings),
        "inconclusive": sum(t.inconclusive for t in timings),
        "median_half_width": float(
            np.median([math.log(t.ci95[1] / t.ci95[0]) / 2 for t in timings])
        ),
        "intervals": [[round(end, 4) for end in t.ci95] for t in timings],
    }


def _summary(outcomes: list[GateResult]) -> dict[str, Any]:
    counts = Counter(outcome.status for outcome in outcomes)
    return {
        "trials": len(outcomes),
        **{status: counts[status] for status in ("pass", "regressed", "inconclusive")},
        "median_s": round(float(np.median([outcome.elapsed_s for outcome in outcomes])), 2),
        "median_pairs": int(np.median([outcome.pairs for outcome in outcomes])),
        "ratios": [None if o.ratio is None else round(o.ratio, 4) for o in outcomes],
    }


def _print(title: str, table: dict[str, Any]) -> None:
    print(
        f"\n{title}\n{'':16}{'trials':>8}{'pass':>8}{'regr.':>8}{'inconcl.':>10}{'pairs':>8}{'s':>8}"
    )
    for name, row in table.items():
        print(
            f"{name:16}{row['trials']:8}{row['pass']:8}{row['regressed']:8}"
            f"{row['inconclusive']:10}{row['median_pairs']:8}{row['median_s']:8}"
        )


def _device() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="simulated, per machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=int, default=0, metavar="N", help="A/A runs of --model")
    parser.add_argument("--proofs", type=int, default=0, metavar="N", help="of --model and itself")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--max-time", type=float, default=60.0, help="seconds per real check")
    parser.add_argument("--sequence-length", type=int, default=128)
    arguments = parser.parse_args()
    if (arguments.real or arguments.proofs) and arguments.model is None:
        parser.error("--real and --proofs need --model")

    document = read_json(RESULTS) if RESULTS.is_file() else {}
    origin = {"device": _device(), "commit": commit(), "fail_on": "p50:5%"}
    if arguments.real:
        document["real_a_a"] = origin | real(
            arguments.model,
            trials=arguments.real,
            max_time_s=arguments.max_time,
            workload=Workload(sequence_length=arguments.sequence_length),
        )
        _print("A/A, real", {arguments.model.stem: document["real_a_a"]})
    elif arguments.proofs:
        document["proofs"] = found = origin | proofs(
            arguments.model,
            trials=arguments.proofs,
            workload=Workload(sequence_length=arguments.sequence_length),
        )
        print(f"95 % intervals of {found['hold_1']} of {found['trials']} proofs hold 1.0")
    else:
        start = time.perf_counter()
        document["simulated"] = origin
        for title, slowdown in (("A/A", 1.0), ("5 % slower", 1.05), ("10 % slower", 1.1)):
            table = simulate(slowdown, trials=arguments.trials, seed=arguments.seed)
            document["simulated"][title] = table
            _print(f"{title}, simulated", table)
        print(f"\n{time.perf_counter() - start:.0f} s")
    write_json(RESULTS, document)


if __name__ == "__main__":
    main()
