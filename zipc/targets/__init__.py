"""Targets: one TOML file each, the shipped ones beside this module."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

import platformdirs
from pydantic import TypeAdapter, ValidationError

from zipc.core.errors import UsageError
from zipc.core.files import write_atomic
from zipc.core.request import DECODING, Request
from zipc.core.types import CONTROL, NUMERICS, Pattern, SpecSheet, Target

SUPPORTED = {  # a target that asks for more would be measured as something it is not
    "runtime": ("onnxruntime", "openvino", "torch", "torch-cuda", "tensorrt"),
    "connection": ("local", "remote"),
    "reference_numeric": ("fp32", "fp16"),
    "numerics": NUMERICS,
}
NO_KERNELS = {  # numerics that run there in floats, slower than fp32, or that zipc does not write
    "onnxruntime": ("bf16",),
    "openvino": ("int8-dynamic", "int4-weights"),
    "torch-cuda": ("bf16", "fp16", "int8-dynamic", "int8-static", "int4-weights"),
    "torch": ("bf16", "int8-dynamic", "int8-static", "int4-weights"),
    "tensorrt": ("int4-weights", "bf16"),
}
ON_CPU = ("onnxruntime", "openvino", "torch")
SERVING = ("onnxruntime", "openvino")  # those that graphs are deployed in
PATTERNS: tuple[str, ...] = get_args(Pattern)
LARGEST_STEP = 4096  # of widths: a wider one leaves nothing to choose
PLAUSIBLE = (1e-3, 1e7)  # figures of a device, in the units of its sheet
AUTO = "auto"  # the faster of those on this device


def load_target(name: str) -> Target:
    """Load a target by its name, or by the path of its .toml file; NAME:MODE is a power mode of it.

    Raises:
        UsageError: no such target or mode, or its file does not describe one.
    """
    base, mode = split_mode(name)
    return read_target(target_file(base), mode=mode)


def requested_target(request: Request) -> Target:
    """The target of a request, under the runtime it names; `auto` leaves that of the target.

    Its numerics are those that its phase may have and, where the runtime is known, that have
    kernels there.

    Raises:
        UsageError: see `load_target`, `on_runtime` and `Request.check`.
    """
    target = load_target(request.target)
    if request.runtime == AUTO:
        for name in SERVING:
            request.check(on_runtime(target, name))
    else:
        target = on_runtime(target, request.runtime or target.runtime)
    request.check(target)
    absent = () if request.phase == "decode" else DECODING
    return _without(target, absent)


def on_runtime(target: Target, runtime: str) -> Target:
    """The same device under another runtime, with the numerics that have kernels there.

    Raises:
        UsageError: the device has no such runtime.
    """
    if runtime != target.runtime and not {runtime, target.runtime} <= set(ON_CPU):
        raise UsageError(
            f"--runtime {runtime} is for processors, and target '{target.name}' runs "
            f"{target.runtime}. Leave it out, or give --target cpu."
            if runtime in ON_CPU
            else f"--runtime {runtime} is not known. Choose from: {', '.join((*ON_CPU, AUTO))}."
        )
    return _without(dataclasses.replace(target, runtime=runtime), NO_KERNELS[runtime])


def on_device(target: Target, fingerprint: Mapping[str, Any]) -> Target:
    """The same without numerics that its processor has no instructions for, where it is known."""
    isa = fingerprint.get("isa")
    able = isa is None or any("bf16" in feature for feature in isa)
    return _without(target, () if able else ("bf16",))


def _without(target: Target, absent: Collection[str]) -> Target:
    numerics = tuple(n for n in target.numerics if n not in absent)
    return dataclasses.replace(target, numerics=numerics)


def split_mode(name: str) -> tuple[str, str]:
    """The name of a target and its power mode; a path has none."""
    base, _, mode = name.partition(":")
    return (name, "") if "/" in name or name.endswith(".toml") else (base, mode)


def target_file(name: str) -> Path:
    """The file of a target by its name; a path stands for itself.

    Raises:
        UsageError: no such target.
    """
    if name.endswith(".toml") or "/" in name:
        return Path(name)
    known = target_files()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"Did you mean '{close[0]}'? " if close else ""
        raise UsageError(
            f"Unknown target '{name}'. {hint}Targets: {', '.join(known)}; one of your own is "
            "given by the path of its .toml file, or by name after zipc targets add FILE."
        )
    return known[name]


def target_files() -> dict[str, Path]:
    """The file of every target by name, sorted: those shipped with zipc and the user's own."""
    found = {path.stem: path for path in own_folder().glob("*.toml")} | shipped_files()
    return dict(sorted(found.items()))


def shipped_files() -> dict[str, Path]:
    """The files of the targets shipped with zipc, by name."""
    return {path.stem: path for path in Path(__file__).parent.glob("*.toml")}


def own_folder() -> Path:
    """Where the user's own targets are kept: `$ZIPC_CONFIG_DIR`, else the user's folder."""
    chosen = os.environ.get("ZIPC_CONFIG_DIR")
    base = Path(os.path.expanduser(chosen)) if chosen else platformdirs.user_config_path("zipc")
    return base / "targets"


def add_target(path: Path, *, name: str | None = None) -> Path:
    """Check a target file and keep a copy under its name; returns where.

    Raises:
        UsageError: it does not describe a target, or there is one of that name.
    """
    from zipc.latency_tables.modelled import device_model  # slow to import

    text = _text(path)
    sheet = _parse(text, where=path).sheet
    for mode in _modes(text):
        _parse(text, where=path, mode=mode)
    if sheet is not None:
        try:
            device_model(sheet.anchors)
        except UsageError as error:
            raise UsageError(f"{path}: anchors: {error}") from error
    name = path.stem if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.endswith(".toml"):
        raise UsageError(
            f"'{name}' cannot be the name of a target: letters, digits, '.-_' only, and no .toml "
            "at its end."
        )
    inner = tomllib.loads(text).get("name", name)
    if inner != name:
        raise UsageError(
            f"{path} calls itself '{inner}' and would be kept as '{name}'. Leave its name out, or "
            f"give --name {inner}."
        )
    held = target_files().get(name)
    if held is not None:
        raise UsageError(f"There is a target '{name}' already: {held}. Give another --name.")
    kept = own_folder() / f"{name}.toml"
    advice = "Make its folder writable, or choose another with ZIPC_CONFIG_DIR."
    write_atomic(kept, text, advice=advice)
    return kept


def read_target(path: Path, *, mode: str = "") -> Target:
    """Read the file of a target, in a power mode of it where one is named.

    Raises:
        UsageError: it cannot be read, does not describe a target, or has no such mode.
    """
    return _parse(_text(path), where=path, mode=mode)


def power_modes(path: Path) -> tuple[str, ...]:
    """The power modes that the file of a target describes beside its usual one."""
    return _modes(_text(path))


def _modes(text: str) -> tuple[str, ...]:
    return tuple(tomllib.loads(text).get("modes", {}))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(
            f"Target file {path} cannot be read: {reason}. Give the path of a .toml file, "
            f"or the name of a target: {', '.join(target_files())}."
        ) from error


def _parse(text: str, *, where: Path, mode: str = "") -> Target:
    try:
        table: dict[str, Any] = {"name": where.stem, **tomllib.loads(text)}
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not valid TOML: {error}.") from error
    modes, sheet = table.pop("modes", {}), table.get("sheet", {})
    tables = {"modes": modes, "sheet": sheet}
    tables |= {f"modes.{n}": m for n, m in modes.items()} if isinstance(modes, dict) else {}
    for key, held in tables.items():
        if not isinstance(held, dict):
            raise UsageError(f"{where}: {key} must be a table, [{key}].")
        if key != "modes":
            _refuse_unknown(held, SpecSheet, where, f" in [{key}]")
    if mode:
        if mode not in modes:
            known = ", ".join(f"{where.stem}:{name}" for name in modes) or "none"
            raise UsageError(f"Target {where.stem} has no power mode '{mode}'. Its modes: {known}.")
        table |= {"name": f"{table['name']}:{mode}", "mode": mode, "sheet": sheet | modes[mode]}
    _refuse_unknown(table, Target, where)
    try:  # as JSON, in which a strict list may be a tuple
        document = json.dumps(table, default=str)
        target = TypeAdapter(Target).validate_json(document, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {key}: {first['msg']}.") from error
    if fault := _fault(target):
        raise UsageError(f"{where}: {fault}")
    return target


def _refuse_unknown(held: Mapping[str, Any], kind: type, where: Path, place: str = "") -> None:
    fields = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(held) - set(fields))
    if unknown:
        raise UsageError(
            f"{where} has unknown keys{place}: {', '.join(unknown)}. Known keys: "
            f"{', '.join(fields)}."
        )


def _fault(target: Target) -> str | None:
    """What is wrong with a target whose fields have the right types."""
    return _wrong_choice(target) or _wrong_sheet(target) or _wrong_text(target)


def _wrong_choice(target: Target) -> str | None:
    runtime, numerics, patterns = target.runtime, target.numerics, target.patterns
    if target.reference_numeric not in numerics:
        return f"numerics must contain the reference numeric '{target.reference_numeric}'."
    lists: dict[str, tuple[str, ...]] = {"numerics": numerics, "patterns": patterns}
    for key, names in lists.items():
        double = [name for name in names if names.count(name) > 1]
        if double:
            return f"{key} has {double[0]} twice."
    if not 1 <= target.width_step <= LARGEST_STEP:
        return f"width_step must be at least 1 and at most {LARGEST_STEP}."
    foreign = set(target.width_grid) - {*NUMERICS, *PATTERNS}
    if foreign:
        known = ", ".join((*NUMERICS, *PATTERNS))
        return f"width_grid has '{min(foreign)}', which is none of {known}."
    if not all(1 <= step <= LARGEST_STEP for step in target.width_grid.values()):
        return f"steps of width_grid must be positive and at most {LARGEST_STEP}."
    runtimes = ON_CPU if runtime in ON_CPU else (runtime,)  # --runtime may change it
    absent = set(numerics).intersection(*(NO_KERNELS.get(name, ()) for name in runtimes))
    if absent:
        return f"{', '.join(absent)} is not offered under {runtime}. Leave it out of numerics."
    if "dense" not in patterns:
        return 'patterns must contain "dense".'
    asked = {
        "runtime": [runtime],
        "connection": [target.connection],
        "reference_numeric": [target.reference_numeric],
        "numerics": numerics,
    }
    for key, values in asked.items():
        for value in values:
            if value not in SUPPORTED[key]:
                return (
                    f"{key} '{value}' is not something zipc can measure yet. Choose from: "
                    f"{', '.join(SUPPORTED[key])}."
                )
    if target.connection == "remote" and runtime != "tensorrt":
        return (
            f"connection 'remote' is for the runtime tensorrt: {runtime} is timed on this machine, "
            "or on the board that --host names. Leave it out."
        )
    return None


def _wrong_sheet(target: Target) -> str | None:
    sheet = target.sheet
    if (target.runtime == "tensorrt") != (sheet is not None):
        fault = "is for the runtime tensorrt alone" if sheet else "is missing"
        return (
            f"a [sheet] with the figures of the device {fault}. `zipc targets show a100` names "
            "the file to begin from."
        )
    if "2:4" in target.patterns and not (sheet and sheet.sparse):
        return (
            "2:4 needs the runtime tensorrt and a [sheet] with sparse = true. Leave it out of "
            "patterns."
        )
    if sheet is None:
        return None
    if not re.fullmatch(r"\d+\.\d", sheet.compute_capability):
        return f"compute_capability '{sheet.compute_capability}' is not of the form \"8.7\"."
    for key, value in dataclasses.asdict(sheet).items():
        figure = isinstance(value, int | float) and not isinstance(value, bool)
        if figure and not PLAUSIBLE[0] <= value <= PLAUSIBLE[1]:
            low, high = PLAUSIBLE
            return f"{key} must be positive, and a plausible figure: {low:g} to {high:g}."
    return None


def _wrong_text(target: Target) -> str | None:
    sheet = target.sheet
    texts = [target.name, target.description, *(() if sheet is None else sheet.source)]
    if any(CONTROL.search(text) for text in texts):
        return "a name, the description or a source has control characters in it."
    return None
