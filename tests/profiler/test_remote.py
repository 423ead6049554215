"""Boards over ssh, on a real sshd on loopback: runs, broken connections, changed keys."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import onnx
import pytest

from tests import loopback
from tests.relu_graph import WORKLOAD, graph
from zipc.core.errors import ExportMismatch, NoisyMeasurement, RemoteError, UsageError
from zipc.profiler import remote
from zipc.profiler.fingerprint import device_fingerprint
from zipc.profiler.link import LinkLost
from zipc.profiler.remote import Host, RemoteDevice, RemoteProcess
from zipc.profiler.timing import interleave, warm_up

BOARD = Host(loopback.ALIAS, sys.executable)


pytestmark = pytest.mark.usefixtures("through_loopback")


@pytest.fixture
def device() -> RemoteDevice:
    return RemoteDevice(BOARD, "onnxruntime")


def test_graphs_are_timed_in_turns_over_there(device: RemoteDevice) -> None:
    timer = device.timer()
    runners = [timer.load(graph(), workload=WORKLOAD) for _ in range(2)]
    assert all(warm_up(runner, max_runs=3) for runner in runners)
    samples = interleave(runners, rounds=11)
    assert [len(s) for s in samples] == [11, 11]
    assert all(ms > 0 for s in samples for ms in s)
    assert runners[0].session_options["intra_op_num_threads"] == 1


def test_a_board_says_what_it_is_and_how_it_is(device: RemoteDevice) -> None:
    found = device.fingerprint()
    assert found.pop("host") == loopback.ALIAS
    assert len(found.pop("machine")) == 12
    assert found == device_fingerprint(runtime="onnxruntime")
    assert device.state()["load_average"]


def test_a_login_that_prints_does_not_disturb(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, device: RemoteDevice
) -> None:
    folder = tmp_path_factory.mktemp("noisy")
    chatty = 'ForceCommand echo Welcome; printf title; eval "$SSH_ORIGINAL_COMMAND"'
    sshd = loopback.start(folder, settings=chatty)
    monkeypatch.setenv("ZIPC_SSH", sshd.command)
    try:
        assert device.timer().load(graph(), workload=WORKLOAD).run() > 0
    finally:
        sshd.stop()


def test_what_the_runtime_there_refuses_is_told_and_the_agent_goes_on(device: RemoteDevice) -> None:
    timer = device.timer()
    bad = onnx.load_from_string(graph())
    bad.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportMismatch, match="NoSuchOperator"):
        timer.load(bad.SerializeToString(), workload=WORKLOAD)
    assert timer.load(graph(), workload=WORKLOAD).run() > 0


def test_a_broken_connection_is_taken_up_again_with_all_graphs(
    server: loopback.Sshd, device: RemoteDevice
) -> None:
    timer = device.timer()
    dropped, *runners = [timer.load(graph(), workload=WORKLOAD) for _ in range(3)]
    del dropped
    server.drop_connections()
    assert [len(s) for s in interleave(runners, rounds=8)] == [8, 8]
    assert timer.load(graph(), workload=WORKLOAD).run() > 0
    assert device.notes == ["the connection to board was lost and taken up again"]


def agent_of(server: loopback.Sshd) -> int:
    found = [
        pid
        for pid in loopback.descendants(server.process.pid)
        if b"zipc-agent" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and os.readlink(f"/proc/{pid}/exe") == os.path.realpath(sys.executable)
    ]
    return found[-1]


def test_a_killed_agent_is_started_again(server: loopback.Sshd, device: RemoteDevice) -> None:
    runner = device.timer().load(graph(), workload=WORKLOAD)
    os.kill(agent_of(server), signal.SIGKILL)
    assert runner.run() > 0
    assert device.notes


def test_an_agent_that_hangs_is_replaced_once(
    server: loopback.Sshd, device: RemoteDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = device.timer().load(graph(), workload=WORKLOAD)
    hung = agent_of(server)
    monkeypatch.setitem(remote.PATIENCE_S, "run", 1.0)
    os.kill(hung, signal.SIGSTOP)
    try:
        assert runner.run() > 0
    finally:
        os.kill(hung, signal.SIGCONT)
    assert device.notes == ["the agent on board did not answer and was started again"]


def test_a_board_that_never_answers_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: RemoteDevice
) -> None:
    sshd = loopback.start(tmp_path, settings="ForceCommand sleep 600")
    monkeypatch.setenv("ZIPC_SSH", sshd.command)
    monkeypatch.setattr(remote, "GREETING_S", 1.0)
    try:
        with pytest.raises(RemoteError, match="stopped answering"):
            device.timer()
    finally:
        sshd.stop()


def test_a_board_that_stays_away_is_an_error_that_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: RemoteDevice
) -> None:
    sshd = loopback.start(tmp_path)
    monkeypatch.setenv("ZIPC_SSH", sshd.command)
    runner = device.timer().load(graph(), workload=WORKLOAD)
    sshd.vanish()
    with pytest.raises(RemoteError, match="nothing answers at its ssh port"):
        runner.run()


def test_the_agent_ends_with_its_object(server: loopback.Sshd, device: RemoteDevice) -> None:
    timer = device.timer()
    pid = agent_of(server)
    timer._link.close()
    assert not Path(f"/proc/{pid}").exists() or agent_gone(pid)


def agent_gone(pid: int) -> bool:
    """sshd reaps it a moment after the client has ended."""
    import time

    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def write_config(server: loopback.Sshd, path: Path, **changes: str) -> str:
    """The client's configuration with some lines changed, as a command."""
    lines = (server.folder / "config").read_text().splitlines()
    kept = [line for line in lines if line.split()[0] not in changes]
    path.write_text("\n".join([*kept, *(f" {name} {value}" for name, value in changes.items())]))
    return f"ssh -F {path}"


@pytest.mark.parametrize(
    "address", ["", "-oProxyCommand=x", "a b", "@", "me@", "@board", "a\x07", "ssh://"]
)
def test_what_ssh_would_not_take_as_a_host_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="is no host"):
        Host(address)


@pytest.mark.parametrize("address", ["board:22", "me@board:2222"])
def test_a_port_is_said_to_need_a_url(address: str) -> None:
    with pytest.raises(UsageError, match=f"ssh://{address}"):
        Host(address)


@pytest.mark.parametrize("address", ["b", "me@board", "ssh://me@board:22", "fe80::1%eth0", "::1"])
def test_what_ssh_takes_is_a_host(address: str) -> None:
    assert Host(address).address == address


def test_an_unknown_host_is_said_to_be_unknown() -> None:
    with pytest.raises(RemoteError, match="there is no such host"):
        RemoteDevice(Host("no-such-board.invalid"), "onnxruntime").timer()


def test_a_refused_key_names_the_way_to_get_in(
    server: loopback.Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: RemoteDevice
) -> None:
    loopback.new_key(tmp_path / "other")
    changed = write_config(server, tmp_path / "config", IdentityFile=str(tmp_path / "other"))
    monkeypatch.setenv("ZIPC_SSH", changed)
    with pytest.raises(RemoteError, match="ssh-copy-id board"):
        device.timer()


def test_a_changed_host_key_is_refused_and_an_unknown_one_too(
    server: loopback.Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: RemoteDevice
) -> None:
    loopback.new_key(tmp_path / "other")
    (tmp_path / "other.pub").rename(tmp_path / "host.pub")
    loopback.know(tmp_path, server.port)
    known = write_config(server, tmp_path / "config", UserKnownHostsFile=str(tmp_path / "known"))
    monkeypatch.setenv("ZIPC_SSH", known)
    # Debian's ssh says how to forget it; others name the line
    remedy = r"ssh-keygen -f \S+ -R \S+|remove line 1 of \S+known"
    with pytest.raises(RemoteError, match=rf"({remedy}).*ssh -F \S+ board once"):
        device.timer()
    (tmp_path / "known").write_text("")
    with pytest.raises(RemoteError, match="not known here"):
        device.timer()


def test_a_missing_python_and_a_missing_runtime_are_told_apart() -> None:
    with pytest.raises(RemoteError, match="there is no /no/python3"):
        RemoteDevice(Host(loopback.ALIAS, "/no/python3"), "onnxruntime").timer()
    with pytest.raises(RemoteError, match="there is no python3-of-nobody"):
        RemoteDevice(Host(loopback.ALIAS, "python3-of-nobody"), "onnxruntime").timer()


def test_a_python_without_onnx_runtime_says_how_to_get_it(tmp_path: Path) -> None:
    bare = tmp_path / "python with space"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    timer = RemoteDevice(Host(loopback.ALIAS, str(bare)), "onnxruntime").timer()
    with pytest.raises(RemoteError, match="pip install onnxruntime"):
        timer.load(graph(), workload=WORKLOAD)


def test_an_onnx_runtime_that_is_too_old_is_said_to_be(tmp_path: Path) -> None:
    old = tmp_path / "onnxruntime-1.19.2.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 1.19.2\n")
    (tmp_path / "onnxruntime.py").write_text(
        "class SessionOptions:\n    def add_session_config_entry(self, *_): ...\n"
        "def InferenceSession(*_, **__): raise ValueError('Unsupported model IR version: 11')\n"
    )
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    device = RemoteDevice(Host(loopback.ALIAS, str(python)), "onnxruntime")
    with pytest.raises(RemoteError, match=r"board: onnxruntime 1\.19\.2 is too old.*>=1\.24"):
        device.timer().load(graph(), workload=WORKLOAD)
    seen = device.examine()
    assert "too old" in seen["lacks"]["onnxruntime"]
    assert "onnxruntime" not in seen["found"]  # as `zipc doctor` would call it ok


@pytest.mark.parametrize(
    ("code", "told", "meaning"),
    [
        (255, "Permission denied for strangers\nx: Connection refused", "sshd there"),
        (255, "Can't open user config file /no: No such file or directory", "Try: ssh"),
        (1, "bash: foo: command not found\nKeyError: {x}", "KeyError: {x}"),
        (1, "python3: Command not found.", "there is no python3"),
        (127, "sh: python3: not found", "there is no python3"),
        (126, "bash: /tmp: Is a directory", "cannot be run"),
        (1, "This account is currently not available.", "not available"),
        (137, "", "short of memory"),
    ],
)
def test_what_ssh_says_is_told_from_what_a_board_says(code: int, told: str, meaning: str) -> None:
    said = remote.explanation(Host("board"), LinkLost(code, told))
    assert said.startswith("board: ")
    assert meaning in said
    assert ("refuses the keys" in said, "there is no python3" in said) == (
        False,
        meaning == "there is no python3",
    )


def test_an_old_python_is_said_to_be_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python3.6"
    old.write_text(
        f"#!{sys.executable} -S\nimport sys\nsys.version_info = (3, 6)\nexec(sys.argv[2])\n"
    )
    old.chmod(0o755)
    with pytest.raises(RemoteError, match=r"older than 3\.8"):
        RemoteDevice(Host(loopback.ALIAS, str(old)), "onnxruntime").timer()


@pytest.mark.parametrize("address", ["", "-oProxyCommand=touch x", "a\nb"])
def test_a_host_that_would_be_an_option_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="user@board"):
        Host(address)


def test_an_unreadable_command_for_ssh_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: RemoteDevice
) -> None:
    monkeypatch.setenv("ZIPC_SSH", "ssh 'unclosed")
    with pytest.raises(UsageError, match="ZIPC_SSH"):
        device.timer()


@pytest.mark.parametrize("command", ["/nowhere/ssh", "/", "no-such-ssh -v"])
def test_where_there_is_no_ssh_it_is_told_how_to_get_one(
    command: str, monkeypatch: pytest.MonkeyPatch, device: RemoteDevice
) -> None:
    monkeypatch.setenv("ZIPC_SSH", command)
    with pytest.raises(UsageError, match=r"There is no .* here.*openssh-client"):
        device.timer()


def test_a_board_that_slows_down_is_told_and_given_up_where_it_lasts(
    device: RemoteDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = [1.0]
    answer = RemoteProcess.ask

    def ask(self: RemoteProcess, command, content=b""):
        if command["do"] == "series":
            return [[number * factor[0]] * command["rounds"] for number in command["graphs"]]
        return answer(self, command, content)

    monkeypatch.setattr(RemoteProcess, "ask", ask)
    timer = device.timer()
    anchor, first, second = (timer.load(graph(), workload=WORKLOAD) for _ in range(3))
    interleave([anchor, first], rounds=4)
    factor[0] = 1.1
    interleave([anchor, first], rounds=4)
    assert device.notes == []
    factor[0] = 1.3
    interleave([anchor, second], rounds=4)
    assert "board became 1.30 times slower" in device.notes[0]
    factor[0] = 2.5
    interleave([anchor, first], rounds=4)
    assert "board became 2.50 times slower" in device.notes[0]
    assert len(device.notes) == 1
    monkeypatch.setattr(remote, "LASTING_S", 0.0)
    with pytest.raises(NoisyMeasurement, match="cool it"):
        interleave([anchor, first], rounds=4)
