"""build.sh, run beside a trtexec that prints what TensorRT's prints and builds nothing."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import onnx.parser
import pytest

from zipc.core.engine_options import EngineOptions
from zipc.core.types import PairedTiming, Workload
from zipc.exporters.tensorrt.script import build_script
from zipc.targets import load_target

GRAPH = """
<ir_version: 8, opset_import: ["": 17]>
net (float[batch, sequence] x) => (float[batch, sequence] y) { y = Relu (x) }
"""
# Times differ from call to call; those of model.engine are 1.0, 1.1, 0.9, 1.2 and 0.8.
TRTEXEC = """#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] [b1] # trtexec $*"
[ "$1" = --help ] && exit 0
echo "$@" >>called
for flag in "$@"; do
    case "$flag" in
    --saveEngine=*) echo part >"${{flag#*=}}" ;;
    --loadEngine=model*)
        set -- 1.0 1.1 0.9 1.2 0.8
        shift $(cat turn)
        ms=$1
        echo $(($(cat turn) + 1)) >turn
        ;;
    --loadEngine=reference*) ms=2.0 ;;
    esac
done
{also}
at="[11/27/2026-12:00:00]"
echo "$at [V] [TRT] (Sparsity) Found 12 layer(s) eligible to use sparse tactics: a, b"
echo "$at [V] [TRT] (Sparsity) Chose 8 layer(s) using sparse tactics: a"
mean="min = 0.1 ms, max = 9.5 ms, mean = 5.2 ms"
[ -z "${{ms:-}}" ] || echo "$at [I] GPU Compute Time: $mean, median = $ms ms, percentile(99%) = 9"
"""


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    called: list[list[str]]
    out: str
    err: str


def call(
    folder: Path,
    version: str = "v101602",
    *,
    also: str = "",
    reference: bool = True,
    target: str = "a100",
    builds: str = "1",
    options: str = "",
) -> Ended:
    tool, called = folder / "trtexec", folder / "called"
    tool.write_text(TRTEXEC.format(version=version.removeprefix("v"), also=also))
    tool.chmod(0o755)
    (folder / "turn").write_text("0")
    (folder / "reference.onnx").write_bytes(b"") if reference else None
    text = build_script(
        onnx.parser.parse_model(GRAPH).SerializeToString(),
        target=load_target(target),
        workload=Workload(batch_size=8, sequence_length=16),
        timing=PairedTiming((), (), 2.0, (1.5, 2.5)),
        ms=1.234,
        known="Predicted",
        options=EngineOptions.parse(options),
    )
    (folder / "build.sh").write_text(text)
    ended = subprocess.run(
        ["sh", str(folder / "build.sh"), "--builderOptimizationLevel=5"],
        env={"PATH": f"{folder}:/usr/bin:/bin", "BUILDS": builds},
        check=False,
        capture_output=True,
        text=True,
    )
    calls = called.read_text().splitlines() if called.exists() else []
    return Ended(ended.returncode, [c.split() for c in calls], ended.stdout, ended.stderr)


def test_one_command_builds_both_and_prints_the_speedup(tmp_path: Path) -> None:
    ended = call(tmp_path)
    assert ended.code == 0
    assert "model 1.0000 ms, reference 2.0000 ms, speedup 2.000x" in ended.out
    assert "(1.667 to 2.500 over 5 turns)" in ended.out
    assert ended.out.endswith("Predicted: 1.23 ms, 2.00x of reference.onnx, 95 % 1.50 to 2.50\n")
    assert {p.name for p in tmp_path.glob("*.engine*")} == {"model.engine", "reference.engine"}
    assert "Found 12 layer(s) eligible to use sparse tactics\n" in ended.out
    assert "Chose 8 layer(s) using sparse tactics\n" in ended.out
    loaded = [c[0].partition("=")[2] for c in ended.called if c[0].startswith("--loadEngine")]
    assert loaded == ["model.engine", "reference.engine"] * 5
    head = (tmp_path / "build.sh").read_text()
    assert "1.23 ms, 2.00x of reference.onnx, 95 % 1.50 to 2.50" in head
    assert "Inputs: x 8x16" in head


def test_without_a_reference_the_model_alone_is_timed(tmp_path: Path) -> None:
    ended = call(tmp_path, reference=False)
    assert ended.code == 0
    assert "model 1.0000 ms\n" in ended.out


@pytest.mark.parametrize(
    ("version", "told"), [("v100300", True), ("v101602", True), ("v110400", False)]
)
def test_each_tensorrt_is_told_what_it_needs(tmp_path: Path, version: str, told: bool) -> None:
    ended = call(tmp_path, version)
    build, run = ended.called[0], ended.called[2]
    assert {"--onnx=model.onnx", "--sparsity=enable", "--builderOptimizationLevel=5"} <= set(build)
    assert {"--minShapes=x:1x1", "--optShapes=x:8x16", "--maxShapes=x:8x16"} <= set(build)
    assert f"--timingCacheFile=timing.{version[1:]}.cache" in build  # one of another is not read
    assert ("--stronglyTyped" in build) == told
    assert ("--noDataTransfers" in run) == told
    assert "--shapes=x:8x16" in run


def test_options_of_the_engine_are_those_of_both(tmp_path: Path) -> None:
    ended = call(tmp_path, options="refit,level=2")
    for built in ended.called[:2]:
        assert "--refit" in built
        flags = [f for f in built if f.startswith("--builderOptimizationLevel")]
        assert flags == ["--builderOptimizationLevel=2", "--builderOptimizationLevel=5"]
    assert not any("--refit" in c for c in ended.called[2:])


def test_builds_that_are_to_differ_share_no_timing_cache(tmp_path: Path) -> None:
    ended = call(tmp_path, builds="2", also='echo 0 >turn; ms="${ms:-}"')
    assert ended.code == 0
    assert "build 1 of 2" in ended.out
    assert "build 2 of 2" in ended.out
    assert not any("--timingCacheFile" in flag for c in ended.called for flag in c)


@pytest.mark.parametrize("version", ["v8601", "v120000"])
def test_other_versions_are_refused(tmp_path: Path, version: str) -> None:
    ended = call(tmp_path, version)
    assert (ended.code, ended.called) == (2, [])
    assert "10 and 11" in ended.err


def test_a_build_that_fails_shows_why_and_leaves_no_engine(tmp_path: Path) -> None:
    ended = call(tmp_path, also='echo "[E] no kernel for node_3"; exit 1')
    assert ended.code == 1
    assert "no kernel for node_3" in ended.err
    assert not (tmp_path / "model.engine").exists()


def test_an_engine_that_does_not_run_is_an_error(tmp_path: Path) -> None:
    ended = call(tmp_path, also="ms=")
    assert ended.code == 1
    assert "no times" in ended.err


@pytest.mark.parametrize("broken", ["model", "reference"])
def test_an_engine_that_gives_no_times_beside_one_that_does_is_an_error(
    tmp_path: Path, broken: str
) -> None:
    ended = call(
        tmp_path, also=f'case "$(tail -n 1 called)" in *--loadEngine={broken}*) ms= ;; esac'
    )
    assert ended.code == 1
    assert "no times" in ended.err
    assert "speedup" not in ended.out


def test_memory_that_ran_out_while_building_is_told(tmp_path: Path) -> None:
    ended = call(tmp_path, also='echo "[E] [TRT] Skipping tactic 3 due to OutOfMemory"')
    assert ended.code == 0
    assert "memory ran out" in ended.err


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("orin", "sudo nvpmodel -m 0 (MAXN)"),
        ("orin:30w", "sudo nvpmodel -m 2 (30w)"),
        ("orin-nano", "choose the power mode"),
        ("a100", ""),
    ],
)
def test_a_jetson_is_told_its_power_mode(tmp_path: Path, target: str, says: str) -> None:
    call(tmp_path, "v8601", target=target)
    head = (tmp_path / "build.sh").read_text()
    assert says in head
    assert ("JetPack 6.1" in head) == bool(says)
