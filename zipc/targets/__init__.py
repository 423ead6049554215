"""Targets: one TOML file each, the shipped ones beside this module."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from zipc.core.errors import UsageError
from zipc.core.types import Target

SUPPORTED = {  # a target that asks for more would be measured as something it is not
    "runtime": ("onnxruntime",),
    "connection": ("local",),
    "reference_numeric": ("fp32",),
    "numerics": ("fp32", "int8-dynamic", "int8-static"),  # named here: `numerics` needs torch
}


def load_target(name: str) -> Target:
    """Load a built-in target by name, or one of the user's own by the path of its .toml file.

    Raises:
        UsageError: no such target, or its file does not describe one.
    """
    if name.endswith(".toml") or "/" in name:
        return _own_target(Path(name))
    known = target_names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"Did you mean '{close[0]}'? " if close else ""
        raise UsageError(
            f"Unknown target '{name}'. {hint}Built-in targets: {', '.join(known)}; "
            "one of your own is given by the path of its .toml file."
        )
    text = resources.files(__name__).joinpath(f"{name}.toml").read_text()
    return _parse(text, where=f"target '{name}'", default_name=name)


def target_names() -> tuple[str, ...]:
    """Names of the targets shipped with zipc, sorted."""
    files = (Path(entry.name) for entry in resources.files(__name__).iterdir())
    return tuple(sorted(file.stem for file in files if file.suffix == ".toml"))


def _own_target(path: Path) -> Target:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(
            f"Target file {path} cannot be read: {reason}. Give the path of a .toml file, "
            f"or a built-in target: {', '.join(target_names())}."
        ) from error
    return _parse(text, where=str(path), default_name=path.stem)


def _parse(text: str, *, where: str, default_name: str) -> Target:
    try:
        table: dict[str, Any] = {"name": default_name, **tomllib.loads(text)}
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not valid TOML: {error}.") from error
    fields = [field.name for field in dataclasses.fields(Target)]
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise UsageError(
            f"{where} has unknown keys: {', '.join(unknown)}. Known keys: {', '.join(fields)}."
        )
    try:
        target = TypeAdapter(Target).validate_python(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {key}: {first['msg']}.") from error
    if target.reference_numeric not in target.numerics or target.width_step < 1:
        raise UsageError(
            f"{where}: numerics must contain the reference numeric "
            f"'{target.reference_numeric}', and width_step must be at least 1."
        )
    asked = {
        "runtime": [target.runtime],
        "connection": [target.connection],
        "reference_numeric": [target.reference_numeric],
        "numerics": target.numerics,
    }
    for key, values in asked.items():
        foreign = [value for value in values if value not in SUPPORTED[key]]
        if foreign:
            raise UsageError(
                f"{where}: {key} '{foreign[0]}' is not something zipc can measure yet. "
                f"Choose from: {', '.join(SUPPORTED[key])}."
            )
    return target
