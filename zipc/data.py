"""The user's data: read, columns found, cut into splits that do not leak into each other."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zipc.core.errors import UsageError
from zipc.read_table import (
    LABEL_NAMES,
    PAIR_NAMES,
    TEXT_NAMES,
    Table,
    few_values,
    find_files,
    is_missing,
    read_table,
    to_number,
)
from zipc.splitting import Part, cut

Label = float | int | str | None
Task = Literal["similarity", "classification", "regression", "none"]


@dataclass(frozen=True, slots=True)
class Row:
    """One example: one text, or the two texts of a pair, and its label where it has one."""

    texts: tuple[str, ...]
    label: Label = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Who may see what: statistics from calibration, the search on search, the report on test."""

    calibration: tuple[Row, ...]
    search: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]
    task: Task
    labels: tuple[str, ...]  # names of the classes, sorted; empty unless task is classification
    description: str
    sha256: str  # of all four splits as cut: everything later depends on the data through it only

    def rows(self, part: Part) -> tuple[Row, ...]:
        parts: dict[Part, tuple[Row, ...]] = {
            "calibration": self.calibration,
            "search": self.search,
            "dev": self.dev,
            "test": self.test,
        }
        return parts[part]


def load_splits(
    path: str,
    *,
    text_columns: tuple[str, ...] = (),
    label_column: str | None = None,
    seed: int = 0,
) -> Splits:
    """Read a file or folder and cut it into calibration, search, dev and test.

    A folder's train, dev and test files keep their roles: calibration and search are cut from
    train; without a labelled test file, dev is the test. A single file is cut 50/20/30 % by a hash
    of the texts, and its search part serves as dev. The seed moves rows between calibration and
    search only, so that figures of several seeds are read on the same test rows. A label column
    named "none" means: use no labels.

    Raises:
        UsageError: nothing usable there, columns not found or ambiguous, or too few rows.
    """
    files = find_files(Path(path).expanduser())
    wanted = {*text_columns, *([label_column] if label_column else [])}
    tables = {role: read_table(file, wanted) for role, file in files.items()}
    first = tables.get("train") or next(iter(tables.values()))
    if not first.rows:
        raise UsageError(f"{first.path} has no rows under its header. Check --data.")
    texts, label = choose_columns(first, text_columns, label_column)
    read: dict[str, list[Row]] = {}
    skipped = 0
    for role, table in tables.items():
        has_label = label in table.names
        _require_columns(table, texts if has_label or role == "test" else (*texts, label or ""))
        read[role] = _rows(table, texts, label if has_label else None)
        skipped += len(table.rows) + table.ragged - len(read[role])
    task, read = _type_labels(read, pair=len(texts) == 2)
    paths = {role: table.path for role, table in tables.items()}
    labelled = None if task == "none" else _has_label
    made = cut(read, paths, key=_key, labelled=labelled, seed=seed)
    parts = made.parts
    if skipped:
        made.notes.append(f"{skipped:,} incomplete rows skipped")
    labels: tuple[str, ...] = ()
    if task == "classification":
        seen = {row.label for rows in parts.values() for row in rows if row.label is not None}
        labels = tuple(str(name) for name in sorted(seen, key=_label_order))
    kind = {"similarity": "float", "regression": "float", "none": ""}.get(
        task, f"{len(labels)} classes"
    )
    told = [f"text: {', '.join(texts)}", f"label: {label} ({kind})" if kind else "no labels"]
    return Splits(
        calibration=tuple(parts["calibration"]),
        search=tuple(parts["search"]),
        dev=tuple(parts["dev"]),
        test=tuple(parts["test"]),
        task=task,
        labels=labels,
        description=" · ".join([*told, made.description]),
        sha256=_digest(parts),
    )


def _has_label(row: Row) -> bool:
    return row.label is not None


def _key(row: Row) -> str:
    """Equal for rows with the same texts, whatever their order, spacing or case."""
    return "\x1f".join(sorted(" ".join(text.casefold().split()) for text in row.texts))


def _digest(parts: Mapping[Part, list[Row]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        rows = [[*row.texts, row.label] for row in parts[name]]
        digest.update(json.dumps([name, rows]).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------ columns and labels


def choose_columns(
    table: Table, texts: tuple[str, ...], label: str | None
) -> tuple[tuple[str, ...], str | None]:
    """Take the columns the user named, guess the others by name and then by content."""
    lower = {name.casefold(): name for name in reversed(table.names)}
    no_label = label is not None and label.casefold() == "none" and label not in table.names
    if len(texts) > 2:
        raise UsageError("A row has one text or two: give --text-column at most twice.")
    _require_columns(table, (*texts, *([label] if label and not no_label else [])))
    if not texts:
        free = {low: name for low, name in lower.items() if name != label}
        pairs = [tuple(free[n] for n in pair) for pair in PAIR_NAMES if set(pair) <= set(free)]
        singles = [(free[n],) for n in TEXT_NAMES if n in free]
        by_name = [c for c in [*pairs, *singles] if all(_is_text(table.column(n)) for n in c)]
        texts = by_name[0] if by_name else _texts_by_content(table, label)
    if no_label:
        return texts, None
    if label is None:
        left = [name for name in table.names if name not in texts]
        named = [lower[n] for n in LABEL_NAMES if n in lower and lower[n] in left]
        likely = [name for name in left if _is_label(table.column(name))]
        if not named and len(likely) > 1:
            raise UsageError(
                f"{table.path} has several columns that could be the label: {', '.join(likely)}. "
                "Name one with --label-column, or give --label-column none."
            )
        label = next(iter([*named, *likely]), None)
    return texts, label


def _texts_by_content(table: Table, label: str | None) -> tuple[str, ...]:
    found = [n for n in table.names if n != label and _is_text(table.column(n))]
    found = [n for n in found if not few_values(table.column(n))] or found
    if not found:
        raise UsageError(
            f"{table.path} has no column of text (columns: {', '.join(table.names)}). "
            "Name one with --text-column."
        )
    if len(found) > 2:
        raise UsageError(
            f"{table.path} has several columns of text: {', '.join(found)}. "
            "Name one or two with --text-column."
        )
    return tuple(found)


def _require_columns(table: Table, names: Sequence[str]) -> None:
    for name in names:
        if name and name not in table.names:
            close = difflib.get_close_matches(name, table.names, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise UsageError(
                f"{table.path} has no column '{name}'.{hint} Its columns: {', '.join(table.names)}."
            )


def _is_text(values: Sequence[Any]) -> bool:
    """Mostly strings with letters and of the length of a phrase, not codes and not numbers."""
    sample = [v for v in values[:2000] if not is_missing(v)]
    words = [v for v in sample if isinstance(v, str) and to_number(v) is None]
    if not words or len(words) < 0.8 * len(sample):
        return False
    phrases = sum(" " in v.strip() or not v.isascii() for v in words)
    return phrases >= 0.3 * len(words)


def _is_label(values: Sequence[Any]) -> bool:
    """Numbers that are not a row's own id, or names of a few classes."""
    present = [v for v in values if not is_missing(v)]
    numbers = [to_number(v) for v in present]
    if present and all(n is not None for n in numbers):
        whole = all(n is not None and n.is_integer() for n in numbers)
        return not (whole and len(set(numbers)) > 0.9 * len(numbers))
    return bool(present) and few_values(values)


def _rows(table: Table, texts: tuple[str, ...], label: str | None) -> list[Row]:
    places = [table.names.index(name) for name in texts]
    at = table.names.index(label) if label else None
    rows = []
    for cells in table.rows:
        found = tuple(cells[i].strip() if isinstance(cells[i], str) else "" for i in places)
        if all(found):
            value = None if at is None or is_missing(cells[at]) else cells[at]
            rows.append(Row(found, value))
    return rows


def _type_labels(read: dict[str, list[Row]], *, pair: bool) -> tuple[Task, dict[str, list[Row]]]:
    """Decide the task from all labels, and give every label the type that goes with it."""
    present = [row.label for rows in read.values() for row in rows if row.label is not None]
    if not present:
        return "none", read
    numbers = [to_number(value) for value in present]
    convert: Callable[[Any], Label]
    if any(number is None for number in numbers):
        task: Task = "classification"
        convert = _label_name
    else:
        whole = all(number is not None and number.is_integer() for number in numbers)
        few = len(set(numbers)) <= (3 if pair else 1000)
        if whole and few:
            task, convert = "classification", lambda value: int(float(value))
        else:
            task, convert = "similarity" if pair else "regression", float
    if task != "classification" and len(set(numbers)) == 1:
        raise UsageError("All labels are equal: nothing can be ranked. Check --label-column.")
    typed = {
        role: [Row(r.texts, None if r.label is None else convert(r.label)) for r in rows]
        for role, rows in read.items()
    }
    return task, typed


def _label_name(value: Any) -> str:
    return str(value).strip()


def _label_order(value: Any) -> tuple[bool, float, str]:
    return isinstance(value, str), float(value) if not isinstance(value, str) else 0.0, str(value)
