"""A real sshd on loopback with keys and files of its own, and a client that uses no other."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

ALIAS, OTHER = "board", "board-2"  # two names of one server


@dataclass
class Sshd:
    """A server; `folder` holds everything of it."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def command(self) -> str:
        """The client, as `ZIPC_SSH` takes it."""
        return f"ssh -F {shlex.quote(str(self.folder / 'config'))}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def vanish(self) -> None:
        """Stop, and cut every connection, as a board that lost its power."""
        self.stop()
        for pid in sessions(self):
            os.kill(pid, signal.SIGKILL)

    def drop_connections(self) -> None:
        """Cut every connection, as a failing network does."""
        for pid in children(self.process.pid):
            os.kill(pid, signal.SIGKILL)


def start(folder: Path, *, settings: str = "") -> Sshd:
    """Start a server that lets this user in with a key of the folder's.

    Raises:
        FileNotFoundError: OpenSSH's server or client is missing; the tests need both.
    """
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if server is None or shutil.which("ssh-keygen") is None:
        raise FileNotFoundError("Install OpenSSH: apt-get install openssh-server openssh-client")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd confines what is not logged in yet
    folder.chmod(0o700)
    for name in ("host", "user"):
        new_key(folder / name)
    (folder / "authorized").write_bytes((folder / "user.pub").read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\n{settings}\n"
    )
    (folder / "config").write_text(
        f"Host {ALIAS} {OTHER}\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n"
        f" IdentityFile {folder}/user\n IdentitiesOnly yes\n IdentityAgent none\n"
        f" UserKnownHostsFile {folder}/known\n GlobalKnownHostsFile none\n"
    )
    know(folder, port)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([server, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    for _ in range(200):
        if process.poll() is not None:
            raise RuntimeError((folder / "log").read_text())
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return Sshd(folder, port, process)
        time.sleep(0.05)
    raise RuntimeError("sshd does not listen")


def new_key(path: Path) -> None:
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def know(folder: Path, port: int, key: str = "host.pub") -> None:
    """Write down a key as the one this client has seen of the server."""
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / key).read_text()}")


def children(pid: int) -> list[int]:
    """Processes started by another, one generation."""
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in told.split()]


def sessions(sshd: Sshd) -> list[int]:
    """Connections of a server: they outlive it."""
    mark = str(sshd.folder / "config").encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    return [n for child in children(pid) for n in (child, *descendants(child))]
