"""The device behind a target, and behind a finished compile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zipc.core.errors import UsageError
from zipc.core.types import Target
from zipc.exporters.tensorrt.script import recipe
from zipc.manifest import TENSORRT, Manifest, recorded_runtime
from zipc.modelled_device import ModelledDevice
from zipc.profiler.agent import TITLES
from zipc.profiler.device import Device, local_device
from zipc.profiler.facts import CAPABILITY
from zipc.profiler.remote import Host, RemoteDevice
from zipc.targets import ON_CPU

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


def refuse_other_gpu(target: Target, prints: Mapping[str, Any]) -> None:
    """Refuse a board whose GPU is of another kind than the target's, where it says.

    Raises:
        UsageError: it is.
    """
    found = prints.get(CAPABILITY)
    if target.sheet is None or found in (None, target.sheet.compute_capability):
        return
    raise UsageError(
        f"The GPU of {prints.get('host', 'this machine')} is {prints.get('gpu')}, of compute "
        f"capability {found}, and target '{target.name}' is one of "
        f"{target.sheet.compute_capability}: what is measured there says nothing about it. Compile "
        "for a target of that GPU: zipc targets list."
    )


def _board(host: Host, runtime: str) -> RemoteDevice:
    if runtime in ONLY_HERE:  # what runs them there takes more of zipc than a board is sent
        instead = ", or give --runtime onnxruntime" if runtime in ON_CPU else ""
        raise UsageError(
            f"{TITLES[runtime]} times graphs on this machine only. Leave --host out{instead}."
        )
    return RemoteDevice(host, runtime, recipe if runtime == TENSORRT else None)
