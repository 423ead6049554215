"""Graphs timed in a process of their own."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import onnx
import pytest

from tests.relu_graph import WORKLOAD, graph
from zipc.core.errors import ExportMismatch, UsageError
from zipc.core.types import Workload
from zipc.profiler.runners.apart import TimingProcess
from zipc.profiler.timing import interleave


def test_graphs_are_loaded_timed_and_dropped() -> None:
    apart = TimingProcess("onnxruntime")
    first, second = (apart.load(graph(), workload=WORKLOAD) for _ in range(2))
    assert all(np.isfinite(r.run()) and r.run() > 0 for r in (first, second))
    del first
    assert second.run() > 0  # the drop travels with this
    third = apart.load(graph(), workload=WORKLOAD)
    assert third.run() > 0
    assert third.session_options["intra_op_num_threads"] == 1


def test_a_series_is_interleaved_over_there(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = TimingProcess("onnxruntime")
    runners = [apart.load(graph(), workload=WORKLOAD) for _ in range(2)]
    asked: list[dict[str, Any]] = []
    ask = apart.ask
    monkeypatch.setattr(apart, "ask", lambda command: asked.append(command) or ask(command))
    told: list[int] = []
    samples = interleave(runners, rounds=19, on_round=lambda: told.append(1))
    assert [len(s) for s in samples] == [19, 19]
    assert all(ms > 0 for s in samples for ms in s)
    assert len(told) == 19
    assert [c["rounds"] for c in asked] == [8, 8, 3]


def test_runners_of_two_processes_are_not_mixed_up() -> None:
    runners = [TimingProcess("onnxruntime").load(graph(), workload=WORKLOAD) for _ in range(2)]
    with pytest.raises(ValueError, match="different processes"):
        interleave(runners, rounds=2)


def test_a_workload_of_default_threads_and_of_given_shapes_is_taken() -> None:
    apart = TimingProcess("onnxruntime")
    workload = Workload(1, None, 0, {"x": (5, 3)})
    assert apart.load(graph(), workload=workload).run() > 0


def test_errors_come_back_as_they_are_raised() -> None:
    apart = TimingProcess("onnxruntime")
    with pytest.raises(ExportMismatch, match="cannot load"):
        apart.load(b"no graph", workload=WORKLOAD)
    with pytest.raises(UsageError, match="--input-shapes"):
        apart.load(onnx_with_open_axis(), workload=WORKLOAD)
    assert apart.load(graph(), workload=WORKLOAD).run() > 0  # it goes on


def onnx_with_open_axis() -> bytes:
    model = onnx.load_from_string(graph())
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    return bytes(model.SerializeToString())


def test_a_process_that_dies_is_said_to_have() -> None:
    apart = TimingProcess("onnxruntime")
    runner = apart.load(graph(), workload=WORKLOAD)
    os.kill(apart._link._process.pid, signal.SIGKILL)
    with pytest.raises(ExportMismatch, match="exit code -9"):
        runner.run()


def test_the_process_ends_with_its_object() -> None:
    apart = TimingProcess("onnxruntime")
    process = apart._link._process
    runner = apart.load(graph(), workload=WORKLOAD)
    del apart
    assert process.poll() is None  # the runner still needs it
    del runner
    assert process.poll() == 0
