"""Boards under TensorRT, over a real sshd: engines, turns, flags of both majors, and failures."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests import fake_trtexec, loopback
from tests.relu_graph import WORKLOAD, graph
from zipc.core.errors import EngineFailed, RemoteError, ZipcError
from zipc.exporters.tensorrt.script import recipe
from zipc.profiler.remote import Host, RemoteDevice
from zipc.profiler.timing import interleave, warm_up
from zipc.profiler.trtexec import SPARE, integers, version

SIZE_MS = len(graph()) / 1e4


pytestmark = pytest.mark.usefixtures("through_loopback")


def board(folder: Path, *, first: str = ":") -> RemoteDevice:
    python = fake_trtexec.python_beside(folder, first=first)
    return RemoteDevice(Host(loopback.ALIAS, python), "tensorrt", recipe)


def left_behind(folder: Path) -> list[Path]:
    """Temporary folders that are still there a moment after an agent was told to end."""
    for _ in range(100):
        found = list(folder.glob("zipc-trtexec-*"))
        if not found:
            break
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("major", ["10", "11"])
def test_engines_are_built_once_and_timed_in_turns(tmp_path: Path, major: str) -> None:
    calls = fake_trtexec.install(tmp_path, major=major)
    device = board(tmp_path)
    timer = device.timer()
    graphs = [graph(axis) for axis in ("batch", "batch", 2)]
    runners = [timer.load(model, workload=WORKLOAD) for model in graphs]
    assert warm_up(runners[0], max_runs=5)
    samples = interleave(runners, rounds=50)
    assert [len(s) for s in samples] == [50] * 3
    for taken, model in zip(samples, graphs, strict=True):
        assert taken == pytest.approx([len(model) / 1e4] * 50, rel=0.01)
    assert "without transfers" in runners[0].session_options["trtexec"]
    built, *timed = [json.loads(line) for line in calls.read_text().splitlines()]
    fixed, *timed = timed
    assert ("--stronglyTyped" in built) == (major == "10")
    assert {"--minShapes=x:1x3", "--maxShapes=x:2x3", "--sparsity=enable"} <= set(built)
    assert not any("Shapes" in flag for flag in fixed)
    assert all(("--noDataTransfers" in call) == (major == "10") for call in timed)
    turns = [call[0] for call in timed[1:]]
    assert turns[:6] == turns[5::-1]  # there and back
    assert device.fingerprint()["runtime_version"] == {"10": "10.3.0", "11": "11.4.0"}[major]
    timer._link.close()
    assert left_behind(tmp_path) == []


def test_engines_that_nothing_uses_any_more_do_not_fill_the_disk(tmp_path: Path) -> None:
    fake_trtexec.install(tmp_path)
    timer = board(tmp_path).timer()
    held = timer.load(graph("batch"), workload=WORKLOAD)
    for rows in range(2, 10):
        timer.load(graph(rows), workload=replace(WORKLOAD, batch_size=rows))
    timer.load(graph("batch"), workload=WORKLOAD)
    assert held.run() > 0
    assert len(list(tmp_path.glob("zipc-trtexec-*/*.engine"))) <= SPARE + 2


@pytest.mark.parametrize(
    ("trouble", "error", "told"),
    [
        ("refused", EngineFailed, r"10\.3\.0 refuses the graph: .*node number 3 .*Invalid Node"),
        ("no gpu", RemoteError, "no CUDA-capable device.*nvidia-smi"),
        ("no room", RemoteError, "could not write its engine.*GB free there"),
        ("killed", RemoteError, "ended by signal 9"),
    ],
)
def test_what_cannot_be_built_says_why(
    tmp_path: Path, trouble: str, error: type[ZipcError], told: str
) -> None:
    fake_trtexec.install(tmp_path, trouble=trouble)
    timer = board(tmp_path).timer()
    with pytest.raises(error, match=told):
        timer.load(graph(), workload=WORKLOAD)
    assert list(tmp_path.glob("zipc-trtexec-*/*.engine")) == []
    timer._link.close()
    assert left_behind(tmp_path) == []


def test_times_that_were_cut_off_are_no_times(tmp_path: Path) -> None:
    fake_trtexec.install(tmp_path, trouble="cut")
    runner = board(tmp_path).timer().load(graph(), workload=WORKLOAD)
    with pytest.raises(RemoteError, match="times cannot be read"):
        runner.run()


def test_a_board_without_trtexec_says_where_it_comes_from(tmp_path: Path) -> None:
    timer = board(tmp_path).timer()
    with pytest.raises(RemoteError, match="apt-get install"):
        timer.load(graph(), workload=WORKLOAD)


def test_a_full_disk_is_told_before_trtexec_is_asked(tmp_path: Path) -> None:
    fake_trtexec.install(tmp_path)
    timer = board(tmp_path, first="ulimit -f 0; trap '' XFSZ").timer()
    with pytest.raises(RemoteError, match="GB free there: make room"):
        timer.load(graph(), workload=WORKLOAD)


def test_what_trtexec_warns_of_and_a_board_that_slows_down_are_noted(tmp_path: Path) -> None:
    fake_trtexec.install(tmp_path, trouble="short of memory")
    device = board(tmp_path)
    timer = device.timer()
    for _ in range(2):
        timer.load(graph(), workload=WORKLOAD)
    assert [note.partition(":")[0] for note in device.notes] == [
        "memory was short while an engine was built"
    ]
    fake_trtexec.install(tmp_path, trouble="hot")
    device = board(tmp_path)
    runners = [device.timer().load(graph(), workload=WORKLOAD)] * 2
    interleave(runners, rounds=80)
    assert "became 1.50 times slower" in device.notes[0]


def test_a_connection_that_ends_takes_the_build_with_it(
    tmp_path: Path, server: loopback.Sshd
) -> None:
    fake_trtexec.install(tmp_path, trouble="slow build")
    timer = board(tmp_path).timer()
    model = graph()
    command = timer._loading(1, model, WORKLOAD) | {"drop": [], "bytes": len(model)}
    timer._link._send(json.dumps(command).encode() + b"\n", model)
    building = tmp_path / "building"
    for _ in range(200):
        if building.exists() and building.read_text():
            break
        time.sleep(0.05)
    server.drop_connections()
    assert left_behind(tmp_path) == []
    assert not Path(f"/proc/{building.read_text()}").exists()


def test_a_killed_agent_is_started_again_and_cleans_up_after_the_first(
    tmp_path: Path, server: loopback.Sshd
) -> None:
    fake_trtexec.install(tmp_path)
    device = board(tmp_path)
    runner = device.timer().load(graph(), workload=WORKLOAD)
    (folder,) = tmp_path.glob("zipc-trtexec-*")
    os.kill(int(folder.name.split("-")[2]), signal.SIGKILL)
    assert runner.run() == pytest.approx(SIZE_MS, rel=0.01)
    (again,) = tmp_path.glob("zipc-trtexec-*")
    assert again != folder
    assert "taken up again" in device.notes[0]


def test_older_versions_are_read_and_refused(tmp_path: Path) -> None:
    fake_trtexec.install(tmp_path, major="8")
    assert version([str(tmp_path / "trtexec")]) == (8, 6, 0)
    timer = board(tmp_path).timer()
    with pytest.raises(RemoteError, match=r"8\.6\.0, and the graph is for 10 and 11"):
        timer.load(graph(), workload=WORKLOAD)


def test_inputs_of_integers_are_such_that_any_vocabulary_has_them() -> None:
    assert integers("attention_mask", [2, 2]) == [1] * 4
    assert integers("position_ids", [2, 3]) == [0, 1, 2, 0, 1, 2]
    assert set(integers("input_ids", [4, 64])) == set(range(1, 8))
    assert integers("token_type_ids", [3]) == [0] * 3
