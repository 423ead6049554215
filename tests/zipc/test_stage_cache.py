"""Finished stages come back whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from zipc.core.errors import UsageError
from zipc.stage_cache import StageCache

FILES = {"a.bin": b"first" * 100, "b.json": b"{}"}


def test_entry_comes_back_from_another_process_of_the_same_root(tmp_path: Path) -> None:
    StageCache(tmp_path).put("export", "k", FILES)
    folder = StageCache(tmp_path).get("export", "k")
    assert folder is not None
    assert {n: (folder / n).read_bytes() for n in FILES} == FILES


def test_stage_and_key_both_name_an_entry(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    cache.put("export", "k", FILES)
    assert cache.get("export", "other") is None
    assert cache.get("evidence", "k") is None
    assert cache.discarded == []


def test_later_entry_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    cache.put("export", "k", FILES)
    folder = cache.put("export", "k", {"a.bin": b"second"})
    assert cache.get("export", "k") == folder
    assert (folder / "a.bin").read_bytes() == b"second"
    assert not (folder / "b.json").exists()


@pytest.mark.parametrize(
    "damage", ["truncated", "edited", "missing", "no sums", "bad sums", "list"]
)
def test_damaged_entry_is_absent_and_named(tmp_path: Path, damage: str) -> None:
    cache = StageCache(tmp_path)
    folder = cache.put("export", "k", FILES)
    if damage == "truncated":
        (folder / "a.bin").write_bytes(FILES["a.bin"][:-1])
    elif damage == "edited":
        (folder / "a.bin").write_bytes(FILES["a.bin"][:-1] + b"x")
    elif damage == "missing":
        (folder / "a.bin").unlink()
    elif damage == "no sums":
        (folder / "sums.json").unlink()
    else:
        (folder / "sums.json").write_text("[1]" if damage == "list" else '{"a.bin":')
    assert cache.get("export", "k") is None
    assert cache.discarded == ["export/k"]
    assert not folder.exists()
    cache.put("export", "k", FILES)
    assert cache.get("export", "k") == folder


def test_oldest_entries_go_when_the_cap_is_passed(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, cap_bytes=2500)
    for age, key in enumerate(("old", "used", "newer")):
        folder = cache.put("export", key, {"x": bytes(700)})
        os.utime(folder, (1000 + age, 1000 + age))
    assert cache.get("export", "old") is not None  # now the one used last
    cache.put("evidence", "new", {"x": bytes(700)})
    held = {d.name for d in (tmp_path / "stages").glob("*/*")}
    assert held == {"old", "newer", "new"}


def test_entry_larger_than_the_cap_is_kept_for_this_run(tmp_path: Path) -> None:
    cache = StageCache(tmp_path, cap_bytes=10)
    assert cache.put("export", "k", FILES).is_dir()
    assert cache.get("export", "k") is not None


def test_full_disk_is_one_message_and_leaves_no_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = StageCache(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match=r"No space.*--cache-dir"):
        cache.put("export", "k", FILES)
    assert cache.get("export", "k") is None
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_file_in_the_place_of_the_cache_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("")
    with pytest.raises(UsageError, match="--cache-dir"):
        StageCache(tmp_path).put("export", "k", FILES)
