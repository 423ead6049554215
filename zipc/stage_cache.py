"""Results of finished stages, by content: a folder per key, written atomically, capped in size."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from zipc.core.errors import UsageError

CAP_BYTES = 4 << 30
_SUMS = "sums.json"


class StageCache:
    """`put` and `get` folders of files under `root/<stage>/<key>`.

    An entry whose files do not match their recorded hashes (truncated, edited) is deleted and
    counts as absent: the stage runs again.
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
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
            try:
                for name, content in files.items():
                    (temporary / name).write_bytes(content)
                sums = {n: hashlib.sha256(c).hexdigest() for n, c in files.items()}
                (temporary / _SUMS).write_text(json.dumps(sums))
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
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
        """Delete the entries used longest ago until the rest fits the cap."""
        entries = [
            d for d in self.root.glob("*/*") if d.is_dir() and not d.name.startswith(".new-")
        ]
        sizes = {d: sum(f.stat().st_size for f in d.iterdir()) for d in entries}
        total = sum(sizes.values())
        for folder in sorted(entries, key=lambda d: d.stat().st_mtime):
            if total <= self._cap:
                return
            if folder != keep:
                total -= sizes[folder]
                shutil.rmtree(folder, ignore_errors=True)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
