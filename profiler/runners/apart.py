"""Graphs timed in a process of their own, whose memory is what a deployed model would find.

After minutes of tracing, searching and repairing, a compile's heap is full of holes, and a graph
loaded into it runs up to 5 % slower than the same file in a fresh process (measured on INT8 MiniLM;
its dense reference, loaded early, does not suffer, so that the speedup comes out too low).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from zipc.core.errors import ExportMismatch
from zipc.core.types import Runner, Workload
from zipc.profiler.link import Link, LinkLost, checked_time, checked_times
from zipc.profiler.runners.inputs import graph_inputs
from zipc.profiler.runners.registry import RUNNERS


class ApartRunner:
    """Times one graph of a `TimingProcess`; a `Runner`. The graph is dropped with this object."""

    def __init__(self, process: TimingProcess, number: int, options: Mapping[str, Any]) -> None:
        self._process = process
        self.number = number
        self.session_options = dict(options)

    @property
    def at_once(self) -> int:
        """Rounds to ask for in one series."""
        return self._process.rounds_at_once

    def run(self) -> float:
        """Do one inference and return its milliseconds."""
        return checked_time(self._process.ask({"do": "run", "graph": self.number}))

    def series(self, runners: Sequence[Runner], *, rounds: int, untimed: int) -> list[list[float]]:
        """Interleaved runs of graphs of this process, all of them over there."""
        numbers = []
        for runner in runners:
            if not isinstance(runner, ApartRunner) or runner._process is not self._process:
                raise ValueError("Runners of different processes cannot be interleaved.")
            numbers.append(runner.number)
        return self._process.series(numbers, rounds=rounds, untimed=untimed)

    def __del__(self) -> None:
        self._process.drop(self.number)


class TimingProcess:
    """A process that times graphs in a runtime, one run at a time; it ends with this object."""

    rounds_at_once = 8
    runner = ApartRunner

    def __init__(self, runtime: str) -> None:
        self._runtime = runtime
        self._loaded = 0
        self._dropped: list[int] = []
        self._link = self._connect()

    def load(self, model: bytes, *, workload: Workload) -> ApartRunner:
        """Load a graph over there.

        Raises:
            ExportMismatch: the runtime cannot load it, or the process died.
            UsageError: the workload does not say how large an input is.
        """
        self._loaded += 1
        self.ask(self._loading(self._loaded, model, workload), model)
        return self.runner(self, self._loaded, self._opened_with(workload))

    def series(self, graphs: Sequence[int], *, rounds: int, untimed: int) -> list[list[float]]:
        """Time graphs by their numbers in turns."""
        asked = {"do": "series", "graphs": list(graphs), "rounds": rounds, "untimed": untimed}
        return checked_times(self.ask(asked), graphs=len(graphs), rounds=rounds)

    def drop(self, number: int) -> None:
        """Forget a graph with the next command."""
        self._dropped.append(number)

    def ask(self, command: Mapping[str, Any], content: bytes = b"") -> Any:
        """One command and its answer; what was dropped since the last one is told with it."""
        told, self._dropped = self._dropped, []
        try:
            return self._link.ask({**command, "drop": told}, content)
        except LinkLost as lost:
            raise ExportMismatch(
                f"The process that times graphs ended with exit code {lost.code}. The machine may "
                "be short of memory: close other programs and run the same command again."
                + (f" It said: {lost.told.splitlines()[-1]}" if lost.told else "")
            ) from lost

    def _loading(self, number: int, model: bytes, workload: Workload) -> dict[str, Any]:
        return {
            "do": "load",
            "graph": number,
            "runtime": self._runtime,
            "options": self._options(model, workload),
            "inputs": graph_inputs(model, workload),
        }

    def _options(self, model: bytes, workload: Workload) -> dict[str, Any]:
        return RUNNERS[self._runtime].options(workload)

    def _opened_with(self, workload: Workload) -> Mapping[str, Any]:
        """What the report says of how a graph is run."""
        return RUNNERS[self._runtime].opened_with(workload)

    def _connect(self) -> Link:
        paths = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        return Link([], python=sys.executable, environment={"PYTHONPATH": paths})
