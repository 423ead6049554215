"""The output folder: everything is written beside it first, then it takes its place at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from zipc.core.errors import CorruptFile, UsageError
from zipc.core.files import MAKE_ROOM, read_json, sha256_file, write_atomic, write_json
from zipc.core.types import Artifact
from zipc.manifest import FILE_NAME

OLD = ".old"  # an earlier output, moved aside for a moment
TIMED = " (timed)"
KINDS = {
    "model.onnx": "model" + TIMED,
    "reference.onnx": "dense reference" + TIMED,
    "model.engine": "engine, never run; latency.notes say by what",
    "build.sh": "builds and times the engine on the device",
    "samples.json": "raw timing samples of the verdict",
}
FOLDERS = {"checkpoint": "checkpoint", "triton": "model repository for Triton"}
MOST_NAMED = 3  # files that a message names
BUILT = ("model.", "reference.", "timing.")  # how names begin of what build.sh leaves


def check_output(out: Path) -> None:
    """Refuse a place where the result could not or should not be written; nothing is left there.

    Raises:
        UsageError: it is a file, holds something that is not ours, cannot be replaced or written.
    """
    out = _real(out)  # a link to another disk is no mount point of it
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file. Choose a folder with -o.")
    if out.is_dir() and any(out.iterdir()):
        _check_ours(out)
    if out.is_dir() and (out.is_mount() or out.samefile(".")):
        raise UsageError(
            f"{out} is a volume or the current folder, which a finished result cannot replace. "
            f"Choose a folder in it, e.g. -o {out / 'compiled'}."
        )
    place = next(folder for folder in out.absolute().parents if folder.exists())
    try:
        handle, probe = tempfile.mkstemp(dir=place, prefix=f".{out.name}.zipc-probe-")
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise UsageError(
            f"Cannot write to {place} ({error.strerror or error}). Choose another with -o."
        ) from error


def _check_ours(out: Path) -> None:
    """Refuse a folder of which a new result would delete what zipc did not write."""
    refused = f"{out} is not empty and was not written by zipc. Choose another with -o."
    try:
        document = read_json(out / FILE_NAME)
    except CorruptFile as error:
        raise UsageError(refused) from error
    if not isinstance(document, dict) or "zipc_version" not in document:
        raise UsageError(refused)
    ours = {FILE_NAME, *KINDS, *FOLDERS}
    names = (path.name for path in out.iterdir())
    others = sorted(n for n in names if n not in ours and not n.startswith(BUILT))
    if others:
        raise UsageError(
            f"{out} holds {', '.join(others[:MOST_NAMED])}, which zipc did not write and a new "
            "result would delete. Move it, or choose another folder with -o."
        )


def _real(out: Path) -> Path:
    """The folder itself, where `out` is a link to it."""
    return out.resolve() if out.is_symlink() else out


@contextlib.contextmanager
def staged(
    out: Path, *, advice: str = f"{MAKE_ROOM} What was there before is kept."
) -> Iterator[Path]:
    """A fresh folder beside `out` that replaces it when the block ends without an error.

    Two runs may write the same `out` at once; the one that ends last stays. `advice` is what a user
    should do where it cannot be written.

    Raises:
        UsageError: the disk is full or the folder cannot be written.
    """
    out = _real(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            with _locked(out.parent):
                _clear_leftovers(out)
                fresh = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.zipc-"))
                held.callback(shutil.rmtree, fresh, ignore_errors=True)
                held.enter_context(_locked(fresh))  # other runs see that it is no leftover
            fresh.chmod(0o755)
            yield fresh
            with _locked(out.parent):
                _take_place(fresh, out)
    except OSError as error:
        raise UsageError(f"Cannot write {out} ({_reason(error)}). {advice}") from error


def _reason(error: OSError) -> str:
    if not isinstance(error, shutil.Error):
        return error.strerror or str(error)
    source, _, said = error.args[0][0]  # of all that copytree could not copy
    number = re.match(r"\[Errno (\d+)\]", said)
    return f"{Path(source).name}: {os.strerror(int(number[1])) if number else said}"


def _take_place(fresh: Path, out: Path) -> None:
    old = fresh.with_name(fresh.name + OLD)
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(out: Path) -> None:
    """Remove what a killed run left; give back an output that it had moved aside."""
    for stale in out.parent.glob(f".{glob.escape(out.name)}.zipc-*"):
        if stale.name.endswith(OLD) and not out.exists():
            stale.rename(out)
            continue
        with (
            contextlib.suppress(BlockingIOError, FileNotFoundError),  # in use, or just gone
            _locked(stale, wait=False),
        ):
            shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a folder's advisory lock, which the system lets go of when the process dies.

    A file system without such locks is used without them.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        yield
    finally:
        os.close(handle)


def write_artifacts(
    folder: Path,
    *,
    model: bytes,
    reference: bytes | None,
    engine: bytes | None,
    script: str | None,
    layout: Mapping[str, bytes],
    structure: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source_folder: Path | None,
    samples: Mapping[str, Any] | None,
) -> tuple[Artifact, ...]:
    """Write everything but the manifest; returns the list of files for it.

    Without `samples` nothing was timed. `script` builds the engine on the device; `layout` are
    more files, by path.
    """
    write_atomic(folder / "model.onnx", model)
    if reference is not None:
        write_atomic(folder / "reference.onnx", reference)
    if engine is not None:
        write_atomic(folder / "model.engine", engine)
    if script is not None:
        write_atomic(folder / "build.sh", script.encode())
        (folder / "build.sh").chmod(0o755)
    for name, content in layout.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, content)
    if samples is not None:
        write_json(folder / "samples.json", samples)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    write_json(checkpoint / "structure.json", structure)
    separate = {n: t.contiguous().clone() for n, t in tensors.items()}  # tied ones twice
    write_atomic(checkpoint / "model.safetensors", save(separate, metadata={"format": "pt"}))
    if source_folder is not None:
        _copy_texts(source_folder, checkpoint)
    files = sorted(p for p in folder.rglob("*") if p.is_file())

    def kind(name: str) -> str:
        found = FOLDERS.get(name.partition("/")[0]) or KINDS[name]
        return found if samples is not None else found.removesuffix(TIMED)

    names = [(str(p.relative_to(folder)), p) for p in files]
    return tuple(Artifact(name, kind(name), sha256_file(path)) for name, path in names)


def _copy_texts(source: Path, checkpoint: Path) -> None:
    """The model's own config, tokenizer and pooling; never its weights or code."""
    skip = {"model.safetensors.index.json", "data_config.json", "structure.json"}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        wanted = path.suffix in (".json", ".txt", ".model") and path.name not in skip
        if wanted and path.is_file() and len(relative.parts) <= 2 and "onnx" not in relative.parts:
            (checkpoint / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, checkpoint / relative)
