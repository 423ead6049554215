"""Results of finished stages, by content: a folder per key, written atomically, capped in size."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.latency_tables.store import default_cache_dir

CAP_BYTES = 4 << 30
_SUMS = "sums.json"
_NEW = ".new-"  # prefix of what is being written
_STALE_S = 86_400.0


class StageCache:
    """`put` and `get` folders of files under `root/<stage>/<key>`.

    An entry whose files do not match their recorded hashes (truncated, edited) is deleted and
    counts as absent: the stage runs again. Several processes may share a root.
    """

    def __init__(self, root: Path, *, cap_bytes: int = CAP_BYTES) -> None:
        self.root = root / "stages"
        self._cap = cap_bytes
        self.discarded: list[str] = []

    def get(self, stage: str, key: str) -> Path | None:
        """The folder of a finished stage, or None."""
        folder = self.root / stage / key
        if not folder.is_dir():
            return None
        try:
            sums = json.loads((folder / _SUMS).read_text())
            intact = bool(sums) and all(_hash(folder / n) == s for n, s in sums.items())
        except (OSError, ValueError, AttributeError):
            intact = False
        if not intact:
            self.discarded.append(f"{stage}/{key}")
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):  # on a disk that can only be read, nothing is evicted
            os.utime(folder)
        return folder

    def put(self, stage: str, key: str, files: Mapping[str, bytes]) -> Path:
        """Store the files of a finished stage.

        Raises:
            UsageError: the cache folder cannot be written.
        """
        folder = self.root / stage / key
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_NEW))
            aside = temporary.with_name(temporary.name + ".old")
            try:
                for name, content in files.items():
                    (temporary / name).write_bytes(content)
                sums = {n: hashlib.sha256(c).hexdigest() for n, c in files.items()}
                (temporary / _SUMS).write_text(json.dumps(sums))
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(aside)
                try:
                    temporary.rename(folder)
                except OSError as error:  # another process has just put the same entry
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise UsageError(
                f"The cache {self.root} cannot be written ({error.strerror or error}). Free some "
                "space, or choose another folder with --cache-dir."
            ) from error
        self._evict(keep=folder)
        return folder

    def drop(self, stage: str, key: str) -> None:
        """Forget a finished stage."""
        shutil.rmtree(self.root / stage / key, ignore_errors=True)

    def _evict(self, *, keep: Path) -> None:
        """Delete the entries used longest ago until the rest fits the cap.

        What a killed process left half-written goes after a day.
        """
        entries: list[tuple[float, int, Path]] = []
        for folder in self.root.glob("*/*"):
            try:
                used = folder.stat().st_mtime
                size = sum(file.stat().st_size for file in folder.iterdir())
            except OSError:  # another process has just deleted it
                continue
            if not folder.name.startswith(_NEW):
                entries.append((used, size, folder))
            elif time.time() - used > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total <= self._cap:
                return
            if folder != keep:
                total -= size
                shutil.rmtree(folder, ignore_errors=True)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_root(request: Request) -> Path:
    """Where a request keeps its tables and finished stages.

    Raises:
        UsageError: see `default_cache_dir`.
    """
    return request.cache_dir or default_cache_dir()


def cache_of(request: Request) -> StageCache:
    return StageCache(cache_root(request))
