"""A conversation with an agent (`agent.py`), here or at the far end of ssh.

What comes back is not trusted: an answer is one bounded line of JSON of a known form, whose numbers
are checked by whoever asked. Nothing of it is run, unpickled or used as a file name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from zipc.core.errors import (
    EngineFailed,
    ExportMismatch,
    NoisyMeasurement,
    RemoteError,
    UsageError,
)
from zipc.core.text import shown
from zipc.core.types import LONGEST_MS
from zipc.profiler import agent, facts, tensorrt_python, trtexec

MAX_ANSWER = 16 << 20  # bytes of a line: the layers of a large engine are a tenth of it
MAX_INT = 1 << 53  # of what a board says of itself: a float holds it
MAX_BANNER = 64 << 10  # bytes a login may print before the agent speaks
PIPE_BYTES = 1 << 20
_KEPT = 8 << 10  # bytes of standard error that are kept
_PATIENCE_S = 5.0  # for a process that was told to end
_ERRORS = {
    error.__name__: error
    for error in (EngineFailed, ExportMismatch, NoisyMeasurement, RemoteError, UsageError)
}


class LinkLost(Exception):
    """The process at the other end is gone; `code` is how it ended, `told` what it said last.

    A `silent` one was ended from here, since it did not answer in time.
    """

    def __init__(self, code: int, told: str, *, silent: bool = False) -> None:
        super().__init__(f"exit code {code}: {told}")
        self.code = code
        self.told = told
        self.silent = silent


class BadAnswer(RemoteError):
    """An answer that no agent gives."""


class _WorkedWith(BaseModel):
    """Facts that are more than shown, where they are told."""

    cores: float = 1
    cpu_mhz: float = 1
    gpu_mhz: float = 1
    load_average: list[float] = []
    temperature_c: dict[str, float] = {}
    isa: list[str] = []


class Link:
    """Starts an agent by a command and asks it things; the process ends with this object.

    It has `patience_s` to speak; None waits for ever.

    Raises:
        LinkLost: the command ended before the agent spoke.
        BadAnswer: something else than the agent spoke.
    """

    def __init__(
        self,
        prefix: Sequence[str],
        *,
        python: str,
        environment: Mapping[str, str] | None = None,
        patience_s: float | None = None,
    ) -> None:
        # What each imports at its top comes first.
        modules = (facts, agent, tensorrt_python, trtexec)
        texts = {m.__name__: Path(m.__file__).read_text() for m in modules if m.__file__}
        source = json.dumps(texts).encode()
        start = [python, "-c", _bootstrap(len(source))]
        # A remote shell reads its words once more.
        words = [*prefix, shlex.join(start)] if prefix else start
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if environment is None else {**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is for the compile, which then ends this
        )
        _widen(self._process)
        self._told, self._printed = bytearray(), bytearray()
        self._reader = threading.Thread(target=_keep, args=(self._process, self._told), daemon=True)
        self._reader.start()
        self.close = weakref.finalize(self, _end, self._process)
        self._silent = False
        with self._patient(patience_s):
            self._send(source)
            self.python_version = self._greeting()

    def ask(
        self, command: Mapping[str, Any], content: bytes = b"", *, patience_s: float | None = None
    ) -> Any:
        """Give a command and return the value answered.

        Raises:
            LinkLost: the connection or the agent ended, or did not answer within `patience_s`.
            BadAnswer: the answer is not one of an agent.
            EngineFailed, ExportMismatch, RemoteError, UsageError: the agent could not do it.
        """
        with self._patient(patience_s):
            self._send(json.dumps({**command, "bytes": len(content)}).encode() + b"\n", content)
            line = self._line(MAX_ANSWER)
        answer = _parsed(line)
        if not isinstance(answer, dict) or answer.keys() not in ({"value"}, {"error", "kind"}):
            raise BadAnswer(f"The agent answered {shown(answer)}, which is no answer.")
        if "error" in answer:
            raise _ERRORS.get(str(answer["kind"]), RemoteError)(shown(answer["error"], 2000))
        return answer["value"]

    @contextlib.contextmanager
    def _patient(self, seconds: float | None) -> Iterator[None]:
        """End the process where what is inside takes longer: no write or read would do so."""
        if seconds is None:
            yield
            return

        def give_up() -> None:
            self._silent = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # a wrapper of ssh has children

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _greeting(self) -> str:
        """Skip what a login prints, up to the agent's first line."""
        greeting, skipped = b'{"' + agent.GREETING.encode(), 0
        while skipped < MAX_BANNER:
            line = self._line(MAX_BANNER)
            _, found, rest = line.partition(greeting)  # what is printed may end in no newline
            if found:
                self._printed.clear()
                return shown(_parsed(found + rest)[agent.GREETING], 40)
            self._printed += line
            skipped += len(line)
        raise BadAnswer(
            f"The other end prints and prints, and no agent answers. It began with: "
            f"{shown(self._printed.decode(errors='replace'))}. Its logins should print nothing."
        )

    def _send(self, *parts: bytes) -> None:
        stream = self._process.stdin
        assert stream is not None
        try:
            for part in parts:
                stream.write(part)
            stream.flush()
        except (OSError, ValueError):
            raise self._lost() from None

    def _line(self, longest: int) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        line = stream.readline(longest + 1)
        if len(line) > longest:
            raise BadAnswer(
                f"The other end sent a line of more than {longest} bytes, as no agent does: "
                f"{shown(line.decode(errors='replace'), 40)}... Look what its logins print."
            )
        if not line.endswith(b"\n"):
            self._printed += line
            raise self._lost()
        return line

    def _lost(self) -> LinkLost:
        self.close()
        self._reader.join(_PATIENCE_S)  # a connection that ssh shares may keep it open
        told = (self._told.strip() or self._printed[-_KEPT:]).decode(errors="replace").strip()
        return LinkLost(self._process.wait(), told, silent=self._silent)


def checked_times(found: Any, *, graphs: int, rounds: int) -> list[list[float]]:
    """The samples of a series, if they are that.

    Raises:
        BadAnswer: another number of them, or something that is not a positive time.
    """
    try:
        if [len(samples) for samples in found] != [rounds] * graphs:
            raise BadAnswer(f"The agent gave another number of times than {graphs} x {rounds}.")
        return [[checked_time(ms) for ms in samples] for samples in found]
    except TypeError:
        raise BadAnswer(f"The agent answered {shown(found)} instead of times.") from None


def checked_time(ms: Any) -> float:
    """Milliseconds, if they can be.

    Raises:
        BadAnswer: not a positive number, or one that no inference takes.
    """
    if type(ms) not in (int, float) or not 0 < ms <= LONGEST_MS:
        raise BadAnswer(f"The agent measured {shown(ms)} ms, which is no time.")
    return float(ms)


def checked_facts(found: Any) -> dict[str, Any]:
    """A fingerprint or state: text, numbers and lists of them by name, without control characters.

    Raises:
        BadAnswer: something else.
    """
    if not isinstance(found, dict):
        raise BadAnswer(f"The agent answered {shown(found)} instead of what it is.")
    facts = {shown(name): _fact(value) for name, value in found.items()}
    try:
        _WorkedWith.model_validate(facts, strict=True)
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        raise BadAnswer(f"The agent says that its {name} is {shown(facts[str(name)])}.") from None
    return facts


def _fact(value: Any) -> Any:
    if isinstance(value, str):
        return shown(value, 500)  # advice of several sentences
    if isinstance(value, list):
        return [_fact(item) for item in value]
    if isinstance(value, dict):
        return checked_facts(value)
    if isinstance(value, int) and abs(value) <= MAX_INT:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise BadAnswer(f"The agent says of itself {shown(value)}.")


def _bootstrap(size: int) -> str:
    """A program for any Python that reads the agent's modules, `size` bytes, and becomes it.

    They are known there by the names they have here. Others are not looked for in the current
    folder: a stray numpy.py there would be run.
    """
    return (
        "import sys; sys.version_info < (3, 8) and sys.exit('Python %d.%d is too old' "
        "% sys.version_info[:2]); sys.path[:] = [p for p in sys.path if p]; import json, types; "
        f"texts = json.loads(sys.stdin.buffer.read({size})); "
        "sys.modules.update((name, types.ModuleType(name)) for name in texts); "
        "[vars(sys.modules[name]).update(SOURCE=text) for name, text in texts.items()]; "
        "[exec(compile(text, 'zipc-agent', 'exec'), vars(sys.modules[name])) "
        "for name, text in texts.items()]; "
        f"sys.modules[{agent.__name__!r}].main()"
    )


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        text = line.decode(errors="replace")
        raise BadAnswer(f"The agent answered {shown(text)}, which is not JSON.") from None


def _widen(process: subprocess.Popen[bytes]) -> None:
    """Let more of a graph into the pipe at once: one of 400 MB is there in half the time."""
    assert process.stdin is not None
    with contextlib.suppress(AttributeError, OSError):  # Linux alone has it; users have a quota
        fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _keep(process: subprocess.Popen[bytes], kept: bytearray) -> None:
    """Keep the end of what a process says on standard error."""
    stream = process.stderr
    assert stream is not None
    with contextlib.suppress(OSError, ValueError), stream:
        while chunk := stream.read1(_KEPT):  # type: ignore[attr-defined]
            kept.extend(chunk)
            del kept[:-_KEPT]


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:  # a dead network, or a build that nobody waits for
        process.kill()
        process.wait()
