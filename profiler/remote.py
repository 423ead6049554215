"""Boards over ssh: the system's OpenSSH client starts an agent there, and graphs are timed by it.

The user's own configuration, keys, jump hosts and host-key checking hold; `ZIPC_SSH` replaces the
command (`ZIPC_SSH="ssh -F FILE"`), as GIT_SSH_COMMAND does for git.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary

from zipc.core.errors import (
    EngineFailed,
    ExportMismatch,
    NoisyMeasurement,
    RemoteError,
    UsageError,
)
from zipc.core.text import shown
from zipc.core.types import TableKind, Workload
from zipc.profiler.link import BadAnswer, Link, LinkLost, checked_facts
from zipc.profiler.runners.apart import ApartRunner, TimingProcess

SSH_OPTIONS = (
    "-T",
    *("-o", "BatchMode=yes"),  # an error, where ssh would ask for something
    *("-o", "ConnectTimeout=20"),
    *("-o", "ServerAliveInterval=15"),
    *("-o", "ServerAliveCountMax=4"),
    *("-o", "ClearAllForwardings=yes"),  # forwarded ports of the user's would be taken twice
    *("-o", "RemoteCommand=none"),
)
PAUSES_S = (1.0, 5.0, 20.0)  # before each new try after a connection was lost
PATIENCE_S = {"load": 300.0, "run": 600.0, "series": 600.0}  # for the answer to a command
BUILD_S = 3600.0  # and for an engine
GREETING_S = 60.0  # and to any other, and for an agent to start
SLOWEST_LINK = 50e3  # bytes per second a graph may take to get there
WARM_RUNS = 3  # of a graph that was loaded again
SLOWER, MUCH_SLOWER = 1.15, 2.0  # than at first: told, and given up where it lasts
LASTING_S = 60.0
SSH_FAILED = 255  # exit code of ssh itself; any other is of what it ran
LOCAL, PYTHON = "local", "python3"

Recipe = Callable[[bytes, Workload], dict[str, Any]]  # of an emitted graph, for trtexec


@dataclass(frozen=True, slots=True)
class Host:
    """A board: where ssh finds it, and its Python."""

    address: str  # anything ssh takes: user@board, an alias of the user's, ssh://user@board:2222;
    # LOCAL is this machine, without ssh
    python: str = PYTHON

    def __post_init__(self) -> None:
        if not self.python.strip() or not self.python.isprintable():
            raise UsageError(f"--host-python {self.python!r} is no program. Name a Python there.")
        if re.fullmatch(r"[^:\s]+:\d+", self.address):
            raise UsageError(
                f"--host {self.address}: a port is written so: ssh://{self.address}, or is set in "
                "your ssh configuration."
            )
        name = re.fullmatch(r"(?:ssh://)?(?![-@])\S+(?<![@/])", self.address)
        if name is None or not self.address.isprintable():
            raise UsageError(
                f"--host {self.address!r} is no host. Write it as ssh does: user@board."
            )


@dataclass(slots=True)
class RemoteDevice:
    """A board under one runtime; a `Device`. What went wrong but was mended is in `notes`.

    Under TensorRT, `recipe` gives the flags of trtexec.
    """

    host: Host
    runtime: str
    recipe: Recipe | None = None
    notes: list[str] = field(default_factory=list)
    _prints: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def kind(self) -> TableKind:
        return "measured"

    def doubt(self, dense: bytes, workload: Workload) -> None:
        return None

    def fingerprint(self) -> dict[str, Any]:
        """What its prices depend on, and which board it is; asked for once."""
        if not self._prints:
            found = self._facts({"do": "fingerprint", "runtime": self.runtime})
            self._prints = {**found, "host": self.host.address}
        return dict(self._prints)

    def state(self) -> dict[str, Any]:
        return self._facts({"do": "state"})

    def examine(self) -> dict[str, Any]:
        """What is there to time with, what is lacking, and how the board is set up."""
        seen = self._facts({"do": "examine"})
        if not all(isinstance(seen.get(part), dict) for part in ("found", "lacks", "state")):
            raise BadAnswer(f"{self.host.address}: the agent does not say what is there.")
        return seen

    def _facts(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        told = self.timer().ask(asked)
        with _on(self.host):
            return checked_facts(told)

    def anew(self, attempt: int) -> RemoteDevice:
        """The same board, where every engine is built anew."""
        recipe = self.recipe
        if recipe is None:
            return self
        return replace(self, recipe=lambda m, w: {**recipe(m, w), "attempt": attempt})

    def timer(self) -> RemoteProcess:
        return RemoteProcess(self) if self.recipe is None else TrtexecProcess(self, self.recipe)


class RemoteProcess(TimingProcess):
    """An agent on a board. A lost connection is taken up again: graphs are sent once more, and what
    was being timed is timed anew.

    Raises:
        RemoteError: the board cannot be reached, or has no usable Python.
    """

    def __init__(self, device: RemoteDevice) -> None:
        self._device = device
        self._held: WeakKeyDictionary[ApartRunner, tuple[bytes, Workload]] = WeakKeyDictionary()
        self._first_ms: dict[int, float] = {}
        self._worst = SLOWER
        self._slow_since: float | None = None
        try:
            with _on(device.host):
                super().__init__(device.runtime)
        except LinkLost as lost:
            raise RemoteError(explanation(device.host, lost)) from lost

    def load(self, model: bytes, *, workload: Workload) -> ApartRunner:
        """Send a graph and load it there.

        Raises:
            ExportMismatch: the runtime there cannot load it.
            RemoteError: the board failed for good, or lacks the runtime.
            UsageError: the workload does not say how large an input is.
        """
        runner = super().load(model, workload=workload)
        self._held[runner] = (model, workload)
        return runner

    def series(self, graphs: Sequence[int], *, rounds: int, untimed: int) -> list[list[float]]:
        with _on(self._device.host):
            samples = super().series(graphs, rounds=rounds, untimed=untimed)
        self._watch(dict(zip(graphs, map(median, samples), strict=False)))
        return samples

    def ask(self, command: Mapping[str, Any], content: bytes = b"") -> Any:
        told, self._dropped = self._dropped, []
        asked = {**command, "drop": told}
        with _on(self._device.host):
            try:
                return self._link.ask(asked, content, patience_s=_patience(asked, content))
            except LinkLost as lost:
                return self._again(asked, content, lost)

    def _again(self, asked: Mapping[str, Any], content: bytes, lost: LinkLost) -> Any:
        """Connect anew and repeat a command: all of them may be."""
        for pause in PAUSES_S:
            if not _may_pass(lost):
                break
            time.sleep(pause)
            try:
                self._link = self._connect()
                self._reload()
                value = self._link.ask(asked, content, patience_s=_patience(asked, content))
            except LinkLost as again:
                if lost.silent and again.silent:
                    break
                lost = again
                continue
            address = self._device.host.address
            self._device.notes.append(
                f"the agent on {address} did not answer and was started again"
                if lost.silent
                else f"the connection to {address} was lost and taken up again"
            )
            return value
        raise RemoteError(explanation(self._device.host, lost)) from lost

    def _reload(self) -> None:
        for runner, (model, workload) in list(self._held.items()):
            loading = self._loading(runner.number, model, workload) | {"drop": []}
            self._link.ask(loading, model, patience_s=_patience(loading, model))
            running = {"do": "run", "graph": runner.number, "drop": []}
            for _ in range(WARM_RUNS):
                self._link.ask(running, patience_s=_patience(running))

    def _connect(self) -> Link:
        host = self._device.host
        if host.address == LOCAL:
            python = sys.executable if host.python == PYTHON else host.python
            if shutil.which(python) is None:
                raise RemoteError(f"{LOCAL}: there is no {python}. Name another --host-python.")
            return Link([], python=python, patience_s=GREETING_S)
        return Link([*ssh_command(), host.address], python=host.python, patience_s=GREETING_S)

    def _watch(self, medians: Mapping[int, float]) -> None:
        """Tell of a board that slows down; all graphs timed before must show it.

        Prices are ratios to an anchor timed beside them and bear some of it.
        """
        slower = min(
            (ms / self._first_ms[n] for n, ms in medians.items() if n in self._first_ms),
            default=1.0,
        )
        for number, ms in medians.items():
            self._first_ms.setdefault(number, ms)
        now = time.monotonic()
        if slower <= MUCH_SLOWER:
            self._slow_since = None
        elif self._slow_since is None:
            self._slow_since = now
        lasting = self._slow_since is not None and now - self._slow_since >= LASTING_S
        if slower <= self._worst and not lasting:
            return
        self._worst = SLOWER * slower
        slowed = f"{self._device.host.address} became "
        told = (
            f"{slowed}{slower:.2f} times slower while it was measured "
            f"({_clocks(self._device.state())})"
        )
        if lasting:
            raise NoisyMeasurement(
                f"{told}. It may be too hot, or doing something else: cool it, choose a lower "
                "power mode, and run the same command again; what was measured is kept."
            )
        notes = self._device.notes
        notes[:] = [note for note in notes if not note.startswith(slowed)]  # the worst will do
        notes.append(told)


class EngineRunner(ApartRunner):
    """A graph that became an engine, which can be read back."""

    def layers(self) -> str:
        """What TensorRT's inspector says of its layers: JSON, and not yet looked at."""
        told = self._process.ask({"do": "layers", "graph": self.number})
        if not isinstance(told, str):
            raise BadAnswer("The agent gave no text of an engine's layers.")
        return told


class TrtexecProcess(RemoteProcess):
    """A `RemoteProcess` whose graphs become engines: trtexec builds and times them.

    An invocation of it takes seconds, so that graphs take turns of many runs. Engines lie in a
    temporary folder there until the connection ends.
    """

    rounds_at_once = 40
    runner = EngineRunner

    def __init__(self, device: RemoteDevice, recipe: Recipe) -> None:
        self._recipe = recipe
        self._measures = ""
        super().__init__(device)

    def load(self, model: bytes, *, workload: Workload) -> ApartRunner:
        """Send a graph and build its engine there.

        Raises:
            EngineFailed: TensorRT refuses the graph.
            RemoteError: the board failed for good, or lacks trtexec, a GPU or room.
            UsageError: the workload does not say how large an input is.
        """
        runner = super().load(model, workload=workload)
        self._hear()
        return runner

    def series(self, graphs: Sequence[int], *, rounds: int, untimed: int) -> list[list[float]]:
        samples = super().series(graphs, rounds=rounds, untimed=untimed)
        self._hear()
        return samples

    def _options(self, model: bytes, workload: Workload) -> dict[str, Any]:
        options = self._recipe(model, workload)
        self._measures = options["measures"]
        return options

    def _opened_with(self, workload: Workload) -> Mapping[str, Any]:
        return {"trtexec": self._measures}

    def _hear(self) -> None:
        """Note what trtexec warned of."""
        told, notes = self.ask({"do": "warnings"}), self._device.notes
        if not isinstance(told, list):
            raise BadAnswer(f"The agent on {self._device.host.address} gave no list of warnings.")
        heard = checked_facts(dict.fromkeys(map(str, told), True))
        notes += [note for note in heard if note not in notes]


def ssh_words() -> str:
    """What starts ssh, as a shell reads it."""
    return os.environ.get("ZIPC_SSH", "").strip() or "ssh"


def ssh_command() -> list[str]:
    """The words that start ssh.

    Raises:
        UsageError: `ZIPC_SSH` cannot be split into words, or there is no such program.
    """
    try:
        chosen = shlex.split(ssh_words())
    except ValueError as error:
        raise UsageError(f"ZIPC_SSH cannot be read: {error}.") from error
    if shutil.which(chosen[0]) is None:
        raise UsageError(
            f"There is no {chosen[0]} here to reach a board by. Install OpenSSH's client "
            "(apt-get install openssh-client), or name one in ZIPC_SSH."
        )
    return [*chosen, *SSH_OPTIONS]


def explanation(host: Host, lost: LinkLost) -> str:
    """Say why there is no agent at a host, and what to do."""
    words = {"host": host.address, "python": host.python, "ssh": ssh_words()}
    return f"{host.address}: {_explained(host, lost).format(**words)}"


def _explained(host: Host, lost: LinkLost) -> str:
    said = lost.told.lower()
    last = _literal(lost.told.splitlines()[-1] if lost.told else "it said nothing")
    if lost.silent:
        return (
            "it stopped answering. It may be busy with something else, or have crashed: look "
            "there, and run the same command again; what was measured is kept."
        )
    if lost.code == SSH_FAILED:
        for sign, meaning in _SIGNS_OF_SSH.items():
            if sign in said:
                return meaning.replace("{remedy}", _literal(_new_key(lost.told)))
        return (
            f"the connection ended ({last}). Try: {{ssh}} {{host}}; then run the same command "
            "again: what was measured is kept."
        )
    if "is too old" in said:
        return "{python} there is older than 3.8. Name a newer one with --host-python."
    absent = ("not found", "no such file")  # some shells end with 1, and say which word it is
    blamed = [line for line in said.splitlines() if host.python.lower() in line]
    if lost.code == 127 or any(sign in line for line in blamed for sign in absent):
        return (
            f"there is no {{python}} ({last}). Install Python 3.8 or newer there, or name it with "
            "--host-python."
        )
    if lost.code == 126:
        return f"{{python}} cannot be run ({last}). Name a Python there with --host-python."
    if lost.code < 0 or lost.code > 128:
        return (
            f"a signal ended the agent (exit code {lost.code}: {last}). It may be short of memory: "
            "run the same command again; what was measured is kept."
        )
    return (
        f"no agent runs there (exit code {lost.code}: {last}). Does this print a version? "
        "{ssh} {host} {python} --version"
    )


def _literal(told: str) -> str:
    """What ssh or a board said, safe to print and to format."""
    return shown(told, 300).replace("{", "{{").replace("}", "}}")


def _new_key(told: str) -> str:
    """How to forget a host key, as ssh says it."""
    command = re.search(r"ssh-keygen -f \S+ -R \S+", told)
    if command:
        return f"run: {command[0]}"
    line = re.search(r"key in (\S+?):(\d+)", told)
    return f"remove line {line[2]} of {line[1]}" if line else "remove it from the known hosts"


@contextlib.contextmanager
def _on(host: Host) -> Iterator[None]:
    """Errors of what is done on a board begin with its name."""
    try:
        yield
    except (EngineFailed, ExportMismatch, RemoteError, UsageError) as error:
        if str(error).startswith(f"{host.address}: "):
            raise
        raise type(error)(f"{host.address}: {error}") from error


def _patience(command: Mapping[str, Any], content: bytes = b"") -> float:
    building = command["do"] == "load" and command["runtime"] == "tensorrt"
    least = BUILD_S if building else PATIENCE_S.get(command["do"], GREETING_S)
    return least + len(content) / SLOWEST_LINK


def _may_pass(lost: LinkLost) -> bool:
    """Whether a new try can help: the connection broke, or a signal ended the agent."""
    return lost.code < 0 or lost.code >= 128


def _clocks(state: Mapping[str, Any]) -> str:
    heat = state.get("temperature_c") or {}
    found = [f"{state[name]:.0f} MHz" for name in ("cpu_mhz", "gpu_mhz") if name in state]
    found += [str(state["gpu"])] if "gpu" in state else []
    found += [f"{max(heat.values()):.0f} °C"] if heat else []
    return ", ".join(found) or "clocks cannot be read there"


_SIGNS_OF_SSH = {  # what it says, in small letters
    "could not resolve hostname": "there is no such host. Check the name, or add it to the ssh "
    "configuration.",
    "host identification has changed": "its host key is not the one it had: another machine may "
    "answer in its place. If it was set up anew, {remedy}; then {ssh} {host} once.",
    "host key verification failed": "its host key is not known here. Run {ssh} {host} once, "
    "compare the key, and accept it.",
    "permission denied (": "it refuses the keys of this user. Run: ssh-copy-id {host} (no password "
    "is asked for here), or name a key in the ssh configuration.",
    "connection refused": "nothing answers at its ssh port. Start sshd there, or give the port in "
    "the ssh configuration.",
    "connection timed out": "it does not answer. Is it on, and in this network?",
    "no route to host": "it cannot be reached. Is it on, and in this network?",
}
