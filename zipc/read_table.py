"""Read csv, tsv, jsonl and txt files into named columns; find the data files of a folder."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipc.core.errors import UsageError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
ROLES = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "val": "dev",
    "test": "test",
}
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "answer"),
    ("query", "passage"),
    ("anchor", "positive"),
)
TEXT_NAMES = (
    "text",
    "sentence",
    "sentences",
    "review",
    "content",
    "utterance",
    "question",
    "tweet",
)
LABEL_NAMES = (
    *("label", "labels", "score", "similarity", "similarity_score", "relatedness_score"),
    *("target", "class", "category", "intent", "sentiment", "stars", "rating", "gold"),
)
KNOWN_NAMES = {*TEXT_NAMES, *LABEL_NAMES, *(name for pair in PAIR_NAMES for name in pair)}
NOT_DATA = {"readme", "license", "licence", "notice", "changelog", "requirements", "origin"}
MISSING = {"", "na", "n/a", "nan", "none", "null"}


@dataclass(frozen=True, slots=True)
class Table:
    """Named columns; `ragged` counts the lines left out for a wrong number of cells."""

    path: Path
    names: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    ragged: int = 0

    def column(self, name: str) -> list[Any]:
        index = self.names.index(name)
        return [row[index] for row in self.rows]


def find_files(path: Path, suffixes: Sequence[str] = SUFFIXES) -> dict[str, Path]:
    """Map roles (train, dev, test, or "all" for a lone file) to the files at `path`.

    Raises:
        UsageError: nothing there, no file of a known kind, or two files for one role.
    """
    if path.is_file():
        if _suffix(path) not in suffixes:
            raise UsageError(
                f"{path} is not one of {', '.join(suffixes)} (or those with .gz), nor arrays in an "
                ".npz file, nor a folder of images."
            )
        return {"all": path}
    if not path.is_dir():
        raise UsageError(f"There is no file or folder {path}. Check --data.")
    found = [
        file
        for file in sorted(path.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and _suffix(file) in suffixes
        and _stem(file).casefold() not in NOT_DATA
    ]
    if not found:
        raise UsageError(
            f"The folder {path} has no data file: {', '.join(suffixes)}, .npz, or folders of "
            "images."
        )
    if len(found) == 1:
        return {"all": found[0]}
    roles: dict[str, Path] = {}
    for file in found:
        words = re.split(r"[^a-z]+", _stem(file).casefold())
        for role in sorted({ROLES[word] for word in words if word in ROLES}):
            if role in roles:
                raise UsageError(
                    f"The folder {path} has two files for {role}: {roles[role].name} and "
                    f"{file.name}. Keep one of them, or pass a file to --data."
                )
            roles[role] = file
    if not roles:
        names = ", ".join(file.name for file in found[:5])
        raise UsageError(
            f"The folder {path} has several data files ({names}) and none is named train, dev or "
            "test. Pass one file to --data."
        )
    return roles if len(roles) > 1 else {"all": next(iter(roles.values()))}


def read_table(path: Path, wanted: Collection[str] = ()) -> Table:
    """Read one file; `wanted` are column names the user gave, which tell a header row.

    Columns of a file without a header are named "column 1", "column 2", and so on.

    Raises:
        UsageError: it is empty, not UTF-8, or not what its suffix says.
    """
    content = _read_text(path)
    suffix = _suffix(path)
    if suffix == ".txt":
        lines = _lines(content)
        return Table(path, ("text",), [(line.strip(),) for line in lines if line.strip()])
    if suffix == ".jsonl":
        return _read_jsonl(path, content)
    rows = [row for row in _read_cells(path, content, suffix) if any(c.strip() for c in row)]
    width = Counter(len(row) for row in rows[:10_000]).most_common(1)[0][0]
    even = [tuple(row) for row in rows if len(row) == width]
    ragged = len(rows) - len(even)
    if ragged > 0.05 * len(rows):
        raise UsageError(
            f"{path}: {ragged:,} of {len(rows):,} lines do not have {width} cells like the others. "
            "Quote cells that contain the separator, or use .tsv, .jsonl or .txt."
        )
    names = tuple(f"column {i + 1}" for i in range(width))
    if len(rows[0]) == width and _is_header(even, wanted):
        names = tuple(cell.strip() for cell in even[0])
        even = even[1:]
    if len(set(names)) < len(names):
        raise UsageError(f"{path} names a column twice: {', '.join(names)}.")
    return Table(path, names, even, ragged)


def read_plain(path: Path) -> str:
    """Read a text file as it is, its line ends as newlines.

    Raises:
        UsageError: it is empty or not UTF-8.
    """
    return "\n".join(_lines(_read_text(path)))


def is_missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().casefold() in MISSING)


def to_number(value: Any) -> float | None:
    """Return the finite number that a cell holds, else None."""
    if isinstance(value, str) and "_" in value:  # float("1_0") is 10
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def few_values(values: Sequence[Any]) -> bool:
    """Whether a column looks like names of classes: few different cells for its length."""
    seen = {str(value) for value in values if not is_missing(value)}
    return len(seen) <= max(2, min(200, len(values) // 4))


def _is_header(rows: list[tuple[str, ...]], wanted: Collection[str]) -> bool:
    """Judge the first row: named by the user, or names above cells that are not like them."""
    first = [cell.strip() for cell in rows[0]]
    if set(wanted) & set(first):
        return True
    looks = [bool(re.fullmatch(r"[A-Za-z_#][\w .\-/()#]{0,39}", cell)) for cell in first]
    if not all(looks) or len(set(first)) < len(first) or any(cell.count(" ") > 2 for cell in first):
        return False
    if any(cell.casefold() in KNOWN_NAMES for cell in first):
        return True
    for i, cell in enumerate(first):
        below = [row[i] for row in rows[1:2000] if not is_missing(row[i])]
        numeric = [to_number(value) is not None for value in below]
        if below and sum(numeric) > 0.95 * len(numeric):
            return True  # a name above numbers
        if len(first) > 1 and len(below) >= 20 and few_values(below) and cell not in below:
            return True  # a name above classes, and no class itself
    return False


def _read_cells(path: Path, content: str, suffix: str) -> list[list[str]]:
    if suffix == ".tsv":
        try:
            rows = list(csv.reader(io.StringIO(content, newline=""), delimiter="\t", strict=True))
            if len({len(row) for row in rows if row}) == 1:
                return rows
        except csv.Error:
            pass
        # Quotes that do not come in pairs are part of the text, as in the GLUE files.
        return [line.split("\t") for line in _lines(content) if line]
    readings = []
    for delimiter in ",;\t":
        try:
            readings.append(list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter)))
        except csv.Error as error:
            if delimiter == ",":
                raise UsageError(f"{path} is not valid CSV: {error}.") from error
    return min(readings, key=_untidiness)


def _untidiness(rows: list[list[str]]) -> tuple[bool, bool]:
    """Order readings by separator: even width over one, then few cells after a space.

    A separator that is always followed by a space is punctuation of the text.
    """
    widths = {len(row) for row in rows if row}
    later = [cell for row in rows[:1000] for cell in row[1:]]
    spaced = sum(cell[:1] == " " for cell in later) / max(len(later), 1)
    even = len(widths) == 1 and max(widths) > 1
    return not even, even and spaced > 0.3


def _read_jsonl(path: Path, content: str) -> Table:
    records: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error.msg}).") from error
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, dict):
            raise UsageError(f"{path}, line {number}: not a JSON object.")
        records.append(record)
        names.update(dict.fromkeys(record))
    return Table(path, tuple(names), [tuple(r.get(name) for name in names) for r in records])


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 (byte {error.start:,}). "
            f"Convert it: iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}"
        ) from error
    if "\0" in content:
        raise UsageError(f"{path} contains zero bytes: it is binary, or UTF-16 and not UTF-8.")
    if not content.strip():
        raise UsageError(f"{path} is empty. Give a file with a row for each example.")
    return content


def _lines(content: str) -> list[str]:
    """Split at line ends only; `str.splitlines` would also split at U+2028 and form feeds."""
    return content.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _suffix(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return Path(name).suffix.casefold()


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).stem
