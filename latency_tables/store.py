"""Latency tables on disk: one JSON file per target, runtime, workload and model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import ValidationError

from zipc.core.errors import CorruptFile, UsageError
from zipc.core.files import fingerprint as digest_of
from zipc.core.files import read_json, write_json
from zipc.core.types import CONTROL, Workload
from zipc.latency_tables.table import SCHEMA_VERSION, LatencyTable

KEY = 12  # letters of a table's key that its short name has
BEGINNING = b'{\n "anchor"'  # of every table
MOST_NAMED = 6  # tables that a message names


class TableStore:
    """The latency tables under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, target: str, workload: Workload, runtime: str, model_key: str) -> Path:
        """Where the table of a model lives; the file need not exist."""
        names = (target, runtime, workload.key, model_key)
        folder, *_, name = map(_safe, names)
        return self.root / folder / f"{_safe(runtime)}-{workload.key}" / f"{name}.json"

    def paths(self) -> list[Path]:
        """All tables, sorted."""
        return sorted(self.root.rglob("*.json"))

    def find(self, name: str) -> Path:
        """A table by the path of its file, or by its name under this folder; see `matching`.

        Raises:
            UsageError: there is no such table, or there are several.
        """
        found = self.matching(name)
        if len(found) == 1:
            return found[0]
        listed = found[:MOST_NAMED]
        short = [short_name(p.stem, workload_key(p)) for p in listed]
        longer = [f"{place(p)}/{name}" for p, name in zip(listed, short, strict=True)]
        names = next((n for n in (short, longer) if len({*n}) == len(n)), [str(p) for p in listed])
        more = ", ..." if len(found) > len(listed) else ""
        raise UsageError(
            f"'{name}' may mean {len(found)} tables: {', '.join(sorted(names))}{more}. Give one of "
            "these, or its path, which zipc tables list --format json has."
        )

    def matching(self, name: str) -> list[Path]:
        """The tables `name` may mean: the path of a file, or [TARGET/]KEY[@WORKLOAD].

        KEY may be shortened; TARGET is `cpu`, or `cpu@board`.

        Raises:
            UsageError: it means none.
        """
        path = Path(name)
        if path.is_file():
            return [path]
        target, _, rest = name.rpartition("/")
        key, _, workload = rest.partition("@")
        found = [
            p
            for p in self.paths()
            if p.stem.startswith(key)
            and (not workload or workload_key(p) == workload)
            and (not target or place(p) == target)
        ]
        if not found:
            raise UsageError(
                f"'{name}' is neither a file nor the name of a table under {self.root}. "
                "Run: zipc tables list"
            )
        return found

    def load(self, path: Path) -> LatencyTable | None:
        """Read a table of any device; None where there is no file.

        Raises:
            CorruptFile: truncated, edited by hand, or written by a newer zipc.
        """
        return read_table(path) if path.exists() else None

    def save(self, table: LatencyTable, path: Path) -> None:
        """Write a table atomically, with a digest that tells an edited file from ours.

        Raises:
            UsageError: the folder cannot be written.
        """
        document = table.model_dump(mode="json")
        write_json(path, document | {"digest": digest_of(document)})


def short_name(key: str, workload: str) -> str:
    """What `TableStore.find` takes for the table of a key and of the key of a workload."""
    return f"{key[:KEY]}@{workload}"


def place(path: Path) -> str:
    """What the table of a store is of: a target, or TARGET@HOST."""
    return path.parent.parent.name


def default_cache_dir() -> Path:
    """`$ZIPC_CACHE_DIR`, else the user's cache folder.

    Raises:
        UsageError: there is neither, as for a user without a home.
    """
    chosen = os.environ.get("ZIPC_CACHE_DIR")
    try:
        folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("zipc")
        if folder.parts[:1] != ("~",):  # older versions of platformdirs, where there is no home
            return folder
    except RuntimeError:
        pass
    raise UsageError(
        "This user has no home folder to keep latency tables and finished stages in. Give "
        "--cache-dir DIR, or set ZIPC_CACHE_DIR."
    )


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Fields of two fingerprints that differ, as `name: stored → current`."""
    return [
        f"{name}: {stored.get(name, 'absent')!r} → {current.get(name, 'absent')!r}"
        for name in sorted({*stored, *current})
        if stored.get(name) != current.get(name)
    ]


def read_table(path: Path) -> LatencyTable:
    """Read a table of any device.

    Raises:
        CorruptFile: truncated, edited by hand, or written by a newer zipc.
    """
    again = "Delete it and run zipc profile again."
    others = "Those there are: zipc tables list"
    advice = f"It is not a latency table. {others}" if path.is_file() else others
    document = read_json(path, advice=again if _was_table(path) else advice)
    if not isinstance(document, dict) or "entries" not in document:
        raise CorruptFile(f"{path} is not a latency table. {others}")
    version = document.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CorruptFile(
            f"{path} has schema {version}; this zipc reads up to {SCHEMA_VERSION}. "
            "Take a newer zipc, or delete the file and run zipc profile again."
        )
    digest = document.pop("digest", None)
    edited = digest != digest_of(document)
    if version in (1, 2, 3, 4):  # 1 had no whole models; none says what parts take beyond what they
        # take alone as now: that is measured anew
        document |= {"schema_version": SCHEMA_VERSION, "in_place": [], "correction": None}
    try:
        table = LatencyTable.model_validate(document)
    except ValidationError as error:
        raise CorruptFile(f"{path}: {_first_fault(error, document)}. {again}") from error
    if edited:
        raise CorruptFile(f"{path} was edited by hand: its digest does not match. {again}")
    return table


def _was_table(path: Path) -> bool:
    """Whether a file is a table of ours, damaged or not: what else there is may be a model."""
    if path.suffix != ".json" or not path.is_file():
        return False
    if re.match(r"b\d+", workload_key(path)):
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(BEGINNING)) == BEGINNING
    except OSError:
        return False


def _first_fault(error: ValidationError, document: Mapping[str, Any]) -> str:
    """Put the first violation in words, naming the entry it is in."""
    fault = error.errors(include_url=False)[0]
    where = [str(part) for part in fault["loc"]]
    if len(where) >= 2 and where[0] == "entries":
        entry = document["entries"][int(where[1])]
        named = isinstance(entry, dict) and "signature" in entry
        where[:2] = [f"entry {_describe(entry)}" if named else f"entry {where[1]}"]
    return f"{', '.join(where) or 'the table'}: {fault['msg']}"


def _describe(entry: Mapping[str, Any]) -> str:
    level = entry.get("level")
    if isinstance(level, dict):
        level = f"{level.get('width')}@{level.get('numeric')}"
    return CONTROL.sub("?", f"{entry['signature']} at {level}")


def workload_key(path: Path) -> str:
    """The workload a table in a store is of, from the name of its folder: RUNTIME-WORKLOAD."""
    return path.parent.name.partition("-")[2]


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._@-]+", "-", name).strip(".") or "-"
