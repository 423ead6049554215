"""The device behind a target, and behind a finished compile."""

from __future__ import annotations

from pathlib import Path

from zipc.core.errors import UsageError
from zipc.core.types import Target
from zipc.exporters.tensorrt.script import recipe
from zipc.manifest import TENSORRT, Manifest, recorded_runtime
from zipc.modelled_device import ModelledDevice
from zipc.profiler.agent import TITLES
from zipc.profiler.device import Device, local_device
from zipc.profiler.remote import Host, RemoteDevice

ONLY_HERE = ("torch", "torch-cuda")


def open_device(target: Target, host: str | None = None, *, python: str = "python3") -> Device:
    """Where graphs for this target are timed, or whose model says how long they take.

    With a `host` it is that board, through ssh and its `python`; nothing is asked of it yet.

    Raises:
        UsageError: the host cannot be one.
    """
    if host is not None:
        return _board(Host(host, python), target.runtime)
    if target.sheet is not None:
        return ModelledDevice.of(target.name, target.sheet)
    return local_device(target.runtime)


def device_of(out: Path, *, host: str | None = None, python: str = "python3") -> Device:
    """Where a finished compile is measured again: on a board, else on this machine.

    Raises:
        CorruptFile: the manifest is missing or damaged.
        UsageError: the host cannot be one, or the runtime is not installed.
    """
    runtime = recorded_runtime(Manifest.read(out).to_json())
    if host is None:
        return local_device("onnxruntime" if runtime == TENSORRT else runtime)
    return _board(Host(host, python), runtime)


def _board(host: Host, runtime: str) -> RemoteDevice:
    if runtime in ONLY_HERE:  # what runs them there takes more of zipc than a board is sent
        raise UsageError(
            f"{TITLES[runtime]} times graphs on this machine only. Leave --host out, or give "
            "--runtime onnxruntime."
        )
    return RemoteDevice(host, runtime, recipe if runtime == TENSORRT else None)
