"""Files: atomic writes, hashes, JSON. Nothing here is ever pickled."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from zipc.core.errors import CorruptFile, UsageError

MAKE_ROOM = "Free some space, or make its folder writable."  # what helps wherever the folder is


def write_atomic(path: Path, content: bytes | str, *, advice: str = MAKE_ROOM) -> None:
    """Write through a temporary file, fsync and rename, so that a reader never sees half a file.

    `advice` is what a user should do where that is not possible.

    Raises:
        UsageError: the folder cannot be written or the disk is full.
    """
    payload = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"Cannot write {path}: {error.strerror or error}. {advice}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: Path, document: Any) -> None:
    write_atomic(path, json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path, *, advice: str = "Delete it and run again.") -> Any:
    """Read a JSON file of ours; `advice` is what a user should do about a damaged one.

    Raises:
        CorruptFile: it is missing, truncated, not JSON or nested without end.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptFile(f"{path} cannot be read ({error}). {advice}") from error


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """Short stable hash of JSON-able parts, for cache keys."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
