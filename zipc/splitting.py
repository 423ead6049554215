"""Who may see which rows: cut any kind of row into parts that do not leak into each other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from zipc.core.errors import UsageError

Part = Literal["calibration", "search", "dev", "test"]
PARTS: tuple[Part, ...] = ("calibration", "search", "dev", "test")
MIN_ROWS = 32
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cut(Generic[T]):
    """Rows by part, and what a user should be told of how they were cut."""

    parts: dict[Part, list[T]]
    notes: list[str]  # first: where the test rows come from

    @property
    def description(self) -> str:
        sizes = [f"{part} {len(self.parts[part]):,}" for part in PARTS]
        return " · ".join([f"{' / '.join(sizes)} ({self.notes[0]})", *self.notes[1:]])


def cut(
    read: Mapping[str, list[T]],
    paths: Mapping[str, Path],
    *,
    key: Callable[[T], str],
    labelled: Callable[[T], bool] | None,
    seed: int,
) -> Cut[T]:
    """Cut the rows of each role (train, dev, test, or "all") into the four parts.

    Rows with equal keys always share a part. Train, dev and test keep their roles: calibration and
    search are cut from train; without a labelled test, dev is the test. A lone role is cut
    50/20/30 % by a hash of the keys, and its search part serves as dev. The seed moves rows
    between calibration and search only. `labelled` is None where no labels are wanted.

    Raises:
        UsageError: too few different rows, or a part is left without any.
    """
    different = len({key(row) for rows in read.values() for row in rows})
    place = next(iter(paths.values()))
    place = place if len(paths) == 1 else place.parent
    if different < MIN_ROWS:
        raise UsageError(
            f"{place} has {different} different usable rows; at least {MIN_ROWS} are needed to "
            "calibrate, search and test. A few thousand are better: pass more with --data."
        )
    has_labels = {role: labelled is not None and any(map(labelled, r)) for role, r in read.items()}
    test_role = "test" if "test" in read else "dev"
    if "dev" in read and labelled is not None and not has_labels.get("test"):
        test_role = "dev"
    pool_role = "train" if "train" in read else "dev"
    if labelled is not None and test_role in read and not has_labels[test_role]:
        test_role = pool_role
    parts: dict[Part, list[T]] = {part: [] for part in PARTS}
    if pool_role == test_role or len(read) == 1:
        role = pool_role if pool_role in read else next(iter(read))
        for row in read[role]:
            in_test = _fraction(key(row), "test") < 0.3
            name = "test" if in_test else _pool_part(key(row), seed, search=2 / 7, dev=0.0)
            parts[name].append(row)
        parts["dev"] = parts["search"]
        notes = [f"cut by hash from {paths[role].name}; dev is the search part"]
    else:
        own_dev = "dev" in read and "dev" not in (pool_role, test_role)
        for row in read[pool_role]:
            name = _pool_part(key(row), seed, search=0.25, dev=0.0 if own_dev else 0.1)
            parts[name].append(row)
        if own_dev:
            parts["dev"] = read["dev"]
        parts["test"] = read[test_role]
        notes = [f"from {paths[test_role].name}"]
        if "test" in read and test_role == "dev":
            notes.append(f"{paths['test'].name} has no labels, so {paths['dev'].name} is the test")
        notes += _drop_leaks(parts, key)
    if labelled is not None:
        for name in ("dev", "test"):
            parts[name] = [row for row in parts[name] if labelled(row)]
    for name in ("calibration", "search", "test"):
        if len(parts[name]) < 2:
            raise UsageError(
                f"{place} leaves {len(parts[name])} rows for the {name} part. "
                "Pass more data with --data."
            )
    return Cut(parts, notes)


def _drop_leaks(parts: dict[Part, list[T]], key: Callable[[T], str]) -> list[str]:
    """Take rows of test out of the parts the compiler learns from."""
    test = {key(row) for row in parts["test"]}
    dropped = 0
    names: tuple[Part, ...] = ("calibration", "search")
    for name in names:
        kept = [row for row in parts[name] if key(row) not in test]
        dropped += len(parts[name]) - len(kept)
        parts[name] = kept
    return [f"{dropped:,} rows that also occur in test dropped"] if dropped else []


def _pool_part(key: str, seed: int, *, search: float, dev: float) -> Part:
    if _fraction(key, "dev") < dev:
        return "dev"
    return "search" if _fraction(key, f"search{seed}") < search else "calibration"


def _fraction(key: str, salt: str) -> float:
    digest = hashlib.sha256(f"{salt}\x1e{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
