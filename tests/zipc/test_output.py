"""OUT is refused early where it cannot be written, and replaced whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

from zipc.core.errors import UsageError
from zipc.output import check_output, staged, write_artifacts


def finished(out: Path) -> Path:
    out.mkdir()
    (out / "manifest.json").write_text('{"zipc_version": "0.1.0"}')
    (out / "model.onnx").write_text("earlier")
    return out


@pytest.mark.parametrize("place", ["new", "new/in/new", "empty", "finished"])
def test_writable_places_pass_and_stay_as_they_are(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    out = finished(tmp_path / "finished")
    check_output(tmp_path / place)
    assert {p.name for p in out.iterdir()} == {"manifest.json", "model.onnx"}
    assert not [p for p in tmp_path.rglob(".*")]
    assert not (tmp_path / "new").exists()


def test_folders_above_are_made_when_the_result_is_written(tmp_path: Path) -> None:
    with staged(tmp_path / "new" / "in" / "new") as folder:
        (folder / "model.onnx").write_text("new")
    assert (tmp_path / "new/in/new/model.onnx").read_text() == "new"


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match=r"is a file.*-o"):
        check_output(tmp_path / "out")
    with pytest.raises(UsageError, match="-o"):
        check_output(tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "mine"


def test_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="not written by zipc"):
        check_output(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"manifest_version": 3, "name": "other"}'])
def test_folder_with_the_manifest_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match="not written by zipc"):
        check_output(tmp_path)


def test_output_that_holds_files_of_its_user_is_refused(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    for name in ("model.log", "model.engine", "timing.10.cache"):  # build.sh leaves these
        (out / name).touch()
    check_output(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt.*would delete"):
        check_output(out)


def test_current_folder_is_refused_since_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (Path(), tmp_path):
        with pytest.raises(UsageError, match="cannot replace"):
            check_output(place)


def test_volume_is_refused_since_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(UsageError, match=r"cannot replace.*compiled"):
        check_output(tmp_path)
    check_output(tmp_path / "compiled")


def test_link_to_another_disk_is_no_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "link"
    link.symlink_to(finished(tmp_path / "out"))
    monkeypatch.setattr(Path, "is_mount", lambda self: self == link)  # its parent is on this disk
    check_output(link)


def test_link_to_an_output_stays_one(tmp_path: Path) -> None:
    out, link = finished(tmp_path / "out"), tmp_path / "link"
    link.symlink_to(out)
    check_output(link)
    with staged(link) as folder:
        (folder / "model.onnx").write_text("new")
    assert link.is_symlink()
    assert (out / "model.onnx").read_text() == "new"
    assert {p.name for p in tmp_path.iterdir()} == {"out", "link"}


def test_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:  # root may write anywhere, so the system's answer is played
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(UsageError, match=r"Permission denied.*-o"):
        check_output(tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UsageError, match="Permission denied"):
            check_output(tmp_path / "out")
    finally:
        tmp_path.chmod(0o755)


def test_fresh_folder_takes_the_place_of_the_earlier_output(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    with staged(out) as folder:
        (folder / "new").write_text("new")
        assert (out / "model.onnx").read_text() == "earlier"
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_error_in_the_middle_leaves_the_earlier_output(
    tmp_path: Path, error: BaseException
) -> None:
    out = finished(tmp_path / "out")

    def write() -> None:
        with staged(out) as folder:
            (folder / "new").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert {p.name for p in out.iterdir()} == {"manifest.json", "model.onnx"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_survives_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = finished(tmp_path / "out")
    really = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if Path(target) == out and not self.name.endswith(".old"):
            raise OSError(errno.EIO, "Input/output error")
        return really(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UsageError, match="Input/output error"), staged(out) as folder:
        (folder / "new").write_text("new")
    assert (out / "model.onnx").read_text() == "earlier"


def test_a_copy_that_does_not_fit_says_which_file_and_why(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    (out / "big").write_bytes(bytes(100_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UsageError) as caught, staged(out) as folder:
            shutil.copytree(out, folder, dirs_exist_ok=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "(big: File too large). Free some space" in str(caught.value)
    assert "with -o" not in str(caught.value)
    assert {p.name for p in out.iterdir()} == {"manifest.json", "model.onnx", "big"}


def test_leftovers_of_a_killed_run_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.zipc-abc").mkdir()
    (tmp_path / ".out.zipc-abc" / "model.onnx").write_text("half")
    with staged(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_run_that_writes_the_same_output_is_left_in_peace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as first:
        with staged(out) as second:
            (second / "second").write_text("")
        assert [p.name for p in out.iterdir()] == ["second"]
        (first / "first").write_text("")
    assert [p.name for p in out.iterdir()] == ["first"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_output_is_written_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # NFS, for a folder

    monkeypatch.setattr(fcntl, "flock", refuse)
    with staged(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_output_moved_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    finished(tmp_path / "out").rename(tmp_path / ".out.zipc-abc.old")
    with pytest.raises(ValueError, match="bug"), staged(tmp_path / "out"):
        raise ValueError("bug")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.onnx").read_text() == "earlier"


def test_artifacts_hold_texts_of_the_model_but_neither_its_weights_nor_code(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    (source / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "vocab.txt", "1_Pooling/config.json"):
        (source / name).write_text("{}")
    for name in ("modeling.py", "pytorch_model.bin", "model.safetensors"):
        (source / name).write_text("no")
    folder = tmp_path / "out"
    folder.mkdir()
    shared = torch.arange(6.0).reshape(2, 3)
    files = write_artifacts(
        folder,
        model=onnx.ModelProto().SerializeToString(),
        reference=None,
        engine=b"engine",
        script="#!/bin/sh\n",
        layout={"triton/m/1/model.onnx": b"graph"},
        structure={"sites": []},
        tensors={"a": shared, "tied": shared, "turned": shared.T},
        source_folder=source,
        samples={},
    )
    assert {f.path for f in files} == {
        "model.onnx",
        "model.engine",
        "build.sh",
        "samples.json",
        "triton/m/1/model.onnx",
        "checkpoint/structure.json",
        "checkpoint/model.safetensors",
        "checkpoint/config.json",
        "checkpoint/vocab.txt",
        "checkpoint/1_Pooling/config.json",
    }
    held = load_file(folder / "checkpoint" / "model.safetensors")
    assert torch.equal(held["tied"], shared)
    assert torch.equal(held["turned"], shared.T)
