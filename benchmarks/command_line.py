"""Run `zipc compile` as a user would, in a process of its own, and say what it cost."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ran:
    """How a compile ended; `said` is what it printed."""

    exit_code: int
    compile_s: float
    peak_rss_gib: float
    said: str

    def require_artifact(self) -> None:
        """Refuse a compile that ended without one."""
        if self.exit_code not in (0, 1, 3):
            raise RuntimeError(f"zipc compile gave {self.exit_code}:\n{self.said[-3000:]}")


def compile_model(arguments: Sequence[str]) -> Ran:
    """Run `zipc compile` with these arguments to its end, for one thread."""
    command = [sys.executable, "-m", "zipc", "compile", *arguments, "--threads", "1"]
    command += ["--format", "json"]
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read().decode(errors="replace")
    seconds = time.monotonic() - started
    return Ran(child.returncode, seconds, usage.ru_maxrss / (1 << 20), said)
