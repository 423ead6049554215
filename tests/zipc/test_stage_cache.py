"""Finished stages come back whole or not at all."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
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


def test_runs_that_share_a_cache_do_not_disturb_each_other(tmp_path: Path) -> None:
    def use(worker: int) -> None:
        cache = StageCache(tmp_path, cap_bytes=3000)
        for turn in range(40):
            cache.put("export", "shared", FILES)
            cache.put("evidence", f"own-{worker}-{turn}", FILES)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert not list(tmp_path.glob("stages/*/.new-*"))
    StageCache(tmp_path).put("export", "shared", FILES)
    assert StageCache(tmp_path).get("export", "shared") is not None


def test_half_written_entry_of_a_killed_run_goes_after_a_day(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    cache.put("export", "k", FILES)
    for name, age_s in ((".new-live", 60.0), (".new-dead", 100_000.0)):
        (tmp_path / "stages" / "export" / name).mkdir()
        used = time.time() - age_s
        os.utime(tmp_path / "stages" / "export" / name, (used, used))
    cache.put("export", "k", FILES)
    assert {p.name for p in (tmp_path / "stages" / "export").iterdir()} == {"k", ".new-live"}


def test_entry_is_read_where_its_age_cannot_be_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    folder = StageCache(tmp_path).put("export", "k", FILES)
    monkeypatch.setattr(os, "utime", refuse)
    assert StageCache(tmp_path).get("export", "k") == folder
