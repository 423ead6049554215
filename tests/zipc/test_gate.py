"""The gate on simulated machines with a fake clock: error rates, time, rules, artifacts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zipc.core.errors import CorruptFile, NoisyMeasurement, UsageError
from zipc.core.types import Workload
from zipc.gate import Rule, check, parse_rules

NEW, BASE = Path("new"), Path("base")


class Machine:
    """A fake clock that its graphs advance; the machine drifts, the graphs have their own noise."""

    def __init__(self, seed: int, *, drift: float = 0.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.now_s = 0.0
        self.drift = drift

    def clock(self) -> float:
        return self.now_s

    def graph(self, ms: float, **noise: float) -> Graph:
        return Graph(self, ms, **noise)


class Graph:
    """A runner with a known time, white and autocorrelated noise, spikes and a slow tail."""

    def __init__(
        self,
        machine: Machine,
        ms: float,
        *,
        white: float = 0.03,
        correlated: float = 0.0,
        spikes: float = 0.0,
        tail: float = 0.0,
    ) -> None:
        self.machine, self.ms, self.white, self.correlated = machine, ms, white, correlated
        self.spikes, self.tail, self.state = spikes, tail, 0.0

    def run(self) -> float:
        rng = self.machine.rng
        self.state = 0.8 * self.state + 0.6 * self.correlated * rng.normal()
        log_ms = self.state + self.white * rng.normal() + self.machine.drift * self.machine.now_s
        ms = self.ms * math.exp(log_ms)
        if rng.random() < self.spikes:
            ms *= 1 + rng.exponential()
        if rng.random() < 0.15:
            ms *= 1 + self.tail
        self.machine.now_s += ms / 1e3
        return float(ms)


NOISES = {
    "white": {"white": 0.05},
    "autocorrelated": {"white": 0.02, "correlated": 0.04},
    "spiky": {"white": 0.03, "spikes": 0.05},
}


def _statuses(slowdown: float, *, noise: dict[str, float], trials: int = 60) -> list[str]:
    statuses = []
    for seed in range(trials):
        machine = Machine(seed, drift=0.003)
        graphs = machine.graph(17.0 * slowdown, **noise), machine.graph(17.0, **noise)
        statuses.append(check(NEW, BASE, runners=graphs, clock=machine.clock).status)
    return statuses


@pytest.mark.parametrize("kind", NOISES)
def test_two_equal_graphs_raise_no_false_alarm(kind: str):
    statuses = _statuses(1.0, noise=NOISES[kind])
    assert statuses.count("regressed") == 0
    assert statuses.count("pass") >= 54


@pytest.mark.parametrize("kind", NOISES)
def test_a_ten_percent_slower_graph_is_found_in_nine_of_ten_checks(kind: str):
    statuses = _statuses(1.1, noise=NOISES[kind])
    assert statuses.count("regressed") >= 54
    assert statuses.count("pass") == 0


def test_a_graph_exactly_on_the_limit_is_rarely_decided_either_way():
    statuses = _statuses(1.05, noise=NOISES["white"], trials=100)
    assert statuses.count("regressed") <= 6
    assert statuses.count("pass") <= 6


def test_a_faster_graph_passes_at_the_first_look():
    machine = Machine(1)
    graphs = machine.graph(10.0), machine.graph(20.0)
    result = check(NEW, BASE, runners=graphs, clock=machine.clock)
    assert (result.status, result.exit_code, result.looks) == ("pass", 0, 1)
    assert result.ratio == pytest.approx(0.5, rel=0.02)
    assert result.interval is not None
    assert result.interval[0] <= 0.5 <= result.interval[1]


def test_undecided_ends_at_the_time_limit_after_at_most_five_looks():
    machine = Machine(2)
    graphs = machine.graph(21.0, white=0.3), machine.graph(20.0, white=0.3)
    result = check(NEW, BASE, runners=graphs, clock=machine.clock, max_time_s=10)
    assert (result.status, result.exit_code) == ("inconclusive", 3)
    assert result.looks <= 5
    assert machine.now_s <= 10 + 8 * 0.1
    assert "more time" in result.rules[0].note


def test_a_graph_too_slow_for_any_interval_is_inconclusive_and_says_why():
    machine = Machine(3)
    graphs = machine.graph(3000.0), machine.graph(3000.0)
    result = check(NEW, BASE, runners=graphs, clock=machine.clock, max_time_s=20)
    assert result.status == "inconclusive"
    assert result.ratio is None
    assert result.interval is None
    assert "too few" in result.rules[0].note
    json.dumps(result.to_json(), allow_nan=False)


def test_a_small_absolute_slowdown_is_forgiven():
    for min_delta_ms, status in ((0.0, "regressed"), (0.5, "pass")):
        machine = Machine(4)
        graphs = machine.graph(1.2), machine.graph(1.0)
        result = check(NEW, BASE, runners=graphs, clock=machine.clock, min_delta_ms=min_delta_ms)
        assert result.status == status
    assert result.rules[0].limit_ratio == pytest.approx(1.5, rel=0.02)


def test_a_tail_rule_finds_a_slower_p90_that_the_median_hides():
    machine = Machine(5)
    graphs = machine.graph(5.0, tail=1.0), machine.graph(5.0)
    result = check(NEW, BASE, fail_on="p50:5%,p90:15%", runners=graphs, clock=machine.clock)
    by_rule = {rule.rule: rule for rule in result.rules}
    assert by_rule["p50:5%"].status == "pass"
    assert by_rule["p90:15%"].status == result.status == "regressed"
    assert by_rule["p90:15%"].ratio == pytest.approx(1.9, rel=0.15)
    assert result.exit_code == 1


def test_p99_waits_for_enough_pairs():
    machine = Machine(6)
    graphs = machine.graph(4.0), machine.graph(4.0)
    result = check(NEW, BASE, fail_on="p99:15%", runners=graphs, clock=machine.clock)
    assert result.status == "pass"
    assert result.pairs >= 600
    machine = Machine(6)
    graphs = machine.graph(40.0), machine.graph(40.0)
    result = check(NEW, BASE, fail_on="p99:15%", runners=graphs, clock=machine.clock)
    assert result.status == "inconclusive"
    assert "too few for p99" in result.rules[0].note


def test_more_rules_share_the_error_rate():
    machine = Machine(7)
    graphs = machine.graph(5.0), machine.graph(5.0)
    one = check(NEW, BASE, runners=graphs, clock=machine.clock)
    two = check(NEW, BASE, fail_on="p50:5%,p90:9%", runners=graphs, clock=machine.clock)
    assert 1 - two.confidence == pytest.approx((1 - one.confidence) / 2)
    assert 1 - one.confidence == pytest.approx(2 * one.error_rate / 5)


def test_a_broken_clock_is_an_error_not_a_result():
    class Broken:
        def run(self) -> float:
            return 0.0

    with pytest.raises(NoisyMeasurement):
        check(NEW, BASE, runners=(Broken(), Broken()))


def test_rules_are_read():
    assert parse_rules("p50:5%, p99:12.5%,size:2%") == (
        Rule("p50", 0.05),
        Rule("p99", 0.125),
        Rule("size", 0.02),
    )
    assert str(Rule("p99", 0.125)) == "p99:12.5%"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "p50",
        "p50:",
        "p50:5",
        "p50:x%",
        "p50:0%",
        "p50:-5%",
        "p50:nan%",
        "p50:5%,,p90:5%",
        "p75:5%",
        "p50:5%,p50:6%",
        "quality:0.5",
    ],
)
def test_an_unreadable_rule_is_a_usage_error(text: str):
    with pytest.raises(UsageError):
        parse_rules(text)


@pytest.mark.parametrize("limits", [{"max_time_s": 0.0}, {"min_delta_ms": -1.0}])
def test_impossible_limits_are_usage_errors(limits: dict[str, float]):
    with pytest.raises(UsageError, match="largest time"):
        check(NEW, BASE, **limits)


def _matmul(path: Path, width: int, *, x: str = "x", kind: int = TensorProto.FLOAT) -> Path:
    graph = helper.make_graph(
        [helper.make_node("MatMul", [x, "w"], ["y"])],
        "matmul",
        [helper.make_tensor_value_info(x, kind, ["batch", "sequence", 64])],
        [helper.make_tensor_value_info("y", kind, ["batch", "sequence", width])],
        [numpy_helper.from_array(np.ones((64, width), np.float32), "w")],
    )
    path.parent.mkdir(exist_ok=True)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path


def test_real_graphs_are_compared_as_folders_or_files_on_the_baselines_workload(tmp_path: Path):
    slow = _matmul(tmp_path / "slow.onnx", 4096)
    fast = _matmul(tmp_path / "base" / "model.onnx", 16).parent
    workload = {"batch_size": 2, "sequence_length": 32, "threads": 1}
    (fast / "manifest.json").write_text(json.dumps({"workload": workload}))
    result = check(slow, fast, fail_on="p50:5%,size:5%", max_time_s=2)
    assert result.workload == Workload(**workload)
    assert [rule.rule for rule in result.rules] == ["p50:5%", "size:5%"]
    assert result.rules[1].status == result.status == "regressed"
    assert set(result.new_ms) == set(result.base_ms) == {"p50", "p90", "p99"}
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize("rules", ["p50:5%", "size:5%"])
@pytest.mark.parametrize("other", [{"x": "image"}, {"kind": TensorProto.DOUBLE}])
def test_graphs_of_other_inputs_are_not_compared(tmp_path: Path, rules: str, other: dict[str, Any]):
    new, base = _matmul(tmp_path / "n.onnx", 8, **other), _matmul(tmp_path / "b.onnx", 8)
    name, kind = other.get("x", "x"), "double" if "kind" in other else "float"
    told = rf"n\.onnx takes {name} \({kind}\) and .*b\.onnx takes x \(float\)"
    with pytest.raises(UsageError, match=told):
        check(new, base, fail_on=rules, max_time_s=1)


def test_size_counts_weights_kept_in_a_second_file(tmp_path: Path):
    whole = _matmul(tmp_path / "whole.onnx", 512)
    split = tmp_path / "split.onnx"
    onnx.save(onnx.load(str(whole)), str(split), save_as_external_data=True, location="w.bin")
    result = check(split, whole, fail_on="size:2%")
    assert result.status == "pass"
    assert result.rules[0].ratio == pytest.approx(1.0, abs=0.01)
    assert result.ratio is None
    assert result.pairs == 0
    (tmp_path / "w.bin").unlink()
    with pytest.raises(UsageError, match=r"w\.bin"):
        check(split, whole, fail_on="size:2%")


def test_missing_and_damaged_artifacts_are_usage_errors(tmp_path: Path):
    graph = _matmul(tmp_path / "a" / "model.onnx", 8)
    with pytest.raises(UsageError, match="no ONNX file"):
        check(tmp_path / "absent.onnx", graph)
    with pytest.raises(UsageError, match="no ONNX file"):
        check(graph, tmp_path)
    (tmp_path / "a" / "manifest.json").write_text("{}")
    with pytest.raises(CorruptFile, match="workload"):
        check(graph, graph.parent)
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="no graph"):
        check(graph, tmp_path / "empty.onnx", fail_on="size:2%")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(UsageError, match="not an ONNX file"):
        check(tmp_path / "text.onnx", graph, fail_on="size:2%")
