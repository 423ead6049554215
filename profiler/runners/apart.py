"""Graphs timed in a process of their own, whose memory is what a deployed model would find.

After minutes of tracing, searching and repairing, a compile's heap is full of holes, and a graph
loaded into it runs up to 5 % slower than the same file in a fresh process (measured on INT8 MiniLM;
its dense reference, loaded early, does not suffer, so that the speedup comes out too low).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from zipc.core.errors import ExportMismatch, NoisyMeasurement, UsageError
from zipc.core.types import Runner, Workload
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner, session_options
from zipc.profiler.timing import interleave

_MODULE = "zipc.profiler.runners.apart"
_ERRORS = {error.__name__: error for error in (ExportMismatch, NoisyMeasurement, UsageError)}


class TimingProcess:
    """A process that holds graphs and times them one run at a time; it ends with this object."""

    def __init__(self) -> None:
        paths = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE],  # -P: no module of the user's folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for the compile, which then ends this
        )
        self._dropped: list[int] = []
        self.close = weakref.finalize(self, _end, self._process)

    def load(self, model: bytes, *, workload: Workload) -> ApartRunner:
        """Load a graph over there.

        Raises:
            ExportMismatch: ONNX Runtime cannot load it, or the process died.
            UsageError: the workload does not say how large an input is.
        """
        asked = {"load": len(model), "workload": dataclasses.asdict(workload)}
        return ApartRunner(self, int(self.ask(asked, model)), session_options(workload))

    def drop(self, number: int) -> None:
        """Forget a graph with the next command."""
        self._dropped.append(number)

    def ask(self, command: Mapping[str, Any], content: bytes = b"") -> Any:
        """One command and its answer; what was dropped since the last one is told with it."""
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        try:
            told, self._dropped = self._dropped, []
            to.write(json.dumps({**command, "drop": told}).encode() + b"\n")
            to.write(content)
            to.flush()
            line = back.readline()
        except OSError:
            line = b""
        if not line:
            code = self._process.wait()
            raise ExportMismatch(
                f"The process that times graphs ended with exit code {code}. The machine may be "
                "short of memory: close other programs and run the same command again."
            )
        answer = json.loads(line)
        if "error" in answer:
            raise _ERRORS[answer["kind"]](answer["error"])
        return answer["value"]


class ApartRunner:
    """Times one graph of a `TimingProcess`; a `Runner`. The graph is dropped with this object."""

    def __init__(self, process: TimingProcess, number: int, options: Mapping[str, Any]) -> None:
        self._process = process
        self._number = number
        self.session_options = dict(options)

    def run(self) -> float:
        """Do one inference and return its milliseconds."""
        return float(self._process.ask({"run": self._number}))

    def series(self, runners: Sequence[Runner], *, rounds: int, untimed: int) -> list[list[float]]:
        """Interleaved runs of graphs of this process, all of them over there."""
        numbers = []
        for runner in runners:
            if not isinstance(runner, ApartRunner) or runner._process is not self._process:
                raise ValueError("Runners of different processes cannot be interleaved.")
            numbers.append(runner._number)
        command = {"series": numbers, "rounds": rounds, "untimed": untimed}
        found: list[list[float]] = self._process.ask(command)
        return found

    def __del__(self) -> None:
        self._process.drop(self._number)


def serve(commands: BinaryIO, answers: BinaryIO) -> None:
    """Answer commands until there are no more."""
    held: dict[int, OnnxRuntimeRunner] = {}
    count = 0
    while line := commands.readline():
        command = json.loads(line)
        model = commands.read(command.get("load", 0))
        count += 1
        try:
            answer: dict[str, Any] = {"value": _answer(command, model, held, count)}
        except tuple(_ERRORS.values()) as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _answer(
    command: Mapping[str, Any], model: bytes, held: dict[int, OnnxRuntimeRunner], number: int
) -> Any:
    for dropped in command["drop"]:
        del held[dropped]
    if "run" in command:
        return held[command["run"]].run()
    if "series" in command:
        runners = [held[n] for n in command["series"]]
        return interleave(runners, rounds=command["rounds"], untimed=command["untimed"])
    fields = command["workload"]
    shapes = {name: tuple(shape) for name, shape in fields["input_shapes"].items()}
    workload = Workload(**{**fields, "input_shapes": shapes})
    held[number] = OnnxRuntimeRunner(model, workload=workload)
    return number


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        serve(sys.stdin.buffer, sys.stdout.buffer)
