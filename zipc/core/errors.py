"""Every error zipc raises on purpose.

ZipcError                  exit code 2 unless said otherwise
├── UsageError             a flag, a file or a model the caller can change
│   ├── TableMissing       no latency table for this target and workload
│   ├── UnsupportedModel   the model cannot be traced, or nothing in it can be removed
│   └── CorruptFile        a file of ours was truncated, edited or is of a newer schema
├── TargetUnreachable      exit code 1: no allocation meets the request
├── ExportMismatch         the emitted graph disagrees with the torch module, or lost its kernels
├── EngineFailed           TensorRT refuses a graph, or its builder crashes, hangs or wants too much
├── NoisyMeasurement       exit code 3: the machine is too noisy for a verdict
└── RemoteError            a board over ssh did not do what was asked

A message says what, where, and the next command to run. Only the CLI turns one into an exit code.
"""

from __future__ import annotations


class ZipcError(Exception):
    """Base of all deliberate errors; `exit_code` is what the CLI returns for it."""

    exit_code = 2


class UsageError(ZipcError):
    """The caller can fix this by changing an argument or a file."""


class TableMissing(UsageError):
    """No usable latency table for the target and workload."""


class UnsupportedModel(UsageError):
    """The model cannot be traced, exported or pruned; says which module and why."""


class CorruptFile(UsageError):
    """A file written by zipc was truncated, edited by hand, or has a newer schema."""


class TargetUnreachable(ZipcError):
    """No allocation meets the request; `best_speedup` is the most that can be had."""

    exit_code = 1

    def __init__(self, message: str, *, best_speedup: float) -> None:
        super().__init__(message)
        self.best_speedup = best_speedup


class ExportMismatch(ZipcError):
    """The emitted graph differs from the torch module, or its integer kernels do not run."""


class EngineFailed(ZipcError):
    """TensorRT refuses the graph, its builder crashed or went over a limit, or the engine is not
    what was asked for."""


class NoisyMeasurement(ZipcError):
    """The timing noise is larger than what was to be decided."""

    exit_code = 3


class RemoteError(ZipcError):
    """A remote device failed; nothing measured so far is lost."""


def first_line(error: BaseException, limit: int = 300) -> str:
    """The beginning of what another library says, for a message of ours."""
    text = str(error).strip()
    return text.splitlines()[0][:limit] if text else ""
