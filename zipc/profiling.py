"""The latency table of a model: known from files and flags where nothing has changed.

Importing torch and tracing a network take longer than all that is asked when a table is there, so
that both come after it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zipc
from zipc.core.beside import beside
from zipc.core.errors import ZipcError
from zipc.core.files import fingerprint, sha256_file
from zipc.core.request import Request
from zipc.core.types import Progress, TableKind
from zipc.devices import open_device
from zipc.exporters.specialise import EMISSION
from zipc.sources.hub import PATTERNS, locate
from zipc.stage_cache import StageCache, cache_root
from zipc.targets import AUTO, requested_target
from zipc.user_code import split_reference

if TYPE_CHECKING:
    from zipc.prices import Prices

STAGE, FILE = "profile", "result.json"
LIBRARIES = ("torch", "transformers", "onnx")  # that of the runtime is in the fingerprint
NOT_ASKED = ("cache_dir", "output")  # of a request: where things are kept


@dataclass(frozen=True, slots=True)
class ProfileResult:
    """Where the table is, of what kind and workload, and what it cost to make."""

    table_path: Path
    kind: TableKind
    workload: str
    entries: int
    seconds: float
    from_cache: bool
    dense_ms: float
    correction_error: float | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"table_path": str(self.table_path)}


def profile_model(request: Request, *, progress: Progress) -> ProfileResult:
    """Build or extend the latency table of a model's sites on the target.

    Asked again for the same files, flags and device, and with the table as it was left, the answer
    is what was said then. A model from a factory is always loaded: its code may import any other.
    """
    root, key = cache_root(request), _key(request)
    known = _recall(root, key)
    if known is not None:
        progress.stage("prices")
        progress.done(f"reused {known.entries} from the latency table")
        return known
    from zipc.groundwork import price_model

    return _remembered(root, key, price_model(request, progress=progress).prices)


def profile_boards(
    requests: Sequence[Request], *, progress: Progress, progress_of: Callable[[str], Progress]
) -> list[ProfileResult | ZipcError]:
    """The same on several boards at once, a table each; `requests` differ in their board alone.

    What becomes of a board that fails is its error; the others go on. What is done on a board is
    told to the `progress_of` its host.
    """
    root, keys = cache_root(requests[0]), beside(_key, requests)
    found = [key if isinstance(key, ZipcError) else _recall(root, key) for key in keys]
    missing = [index for index, known in enumerate(found) if known is None]
    if missing:
        from zipc.groundwork import price_on_boards

        asked = [requests[index] for index in missing]
        made = price_on_boards(asked, progress=progress, progress_of=progress_of)
        for index, priced in zip(missing, made, strict=True):
            if isinstance(priced, ZipcError):
                found[index] = priced
            elif not isinstance(key := keys[index], ZipcError):
                found[index] = _remembered(root, key, priced.prices)
    return [result for result in found if result is not None]


def _remembered(root: Path, key: str | None, prices: Prices) -> ProfileResult:
    """What came out, kept for the next time the same is asked.

    The path of the table is kept relative to the cache, which may be copied or moved.
    """
    fitted = prices.table.correction
    result = ProfileResult(
        table_path=prices.path,
        kind=prices.table.kind,
        workload=str(prices.table.workload),
        entries=len(prices.table.entries),
        seconds=prices.seconds,
        from_cache=prices.from_cache,
        dense_ms=prices.dense_ms,
        correction_error=fitted.median_error if fitted else None,
    )
    if key is not None and result.table_path.exists():
        place = str(result.table_path.relative_to(root))
        held = {
            "result": result.to_json() | {"table_path": place},
            "table_sha256": sha256_file(result.table_path),
        }
        StageCache(root).put(STAGE, key, {FILE: json.dumps(held).encode()})
    return result


def _key(request: Request) -> str | None:
    """Names all that a table follows from; None where that is not known without running code, or a
    runtime is still to be chosen."""
    if split_reference(request.model) is not None or request.runtime == AUTO:
        return None
    target = requested_target(request)
    prints = open_device(target, request.host, python=request.host_python).fingerprint()
    folder, _ = locate(request.model)
    files = sorted({path for pattern in PATTERNS for path in folder.glob(pattern)})
    asked = {k: v for k, v in dataclasses.asdict(request).items() if k not in NOT_ASKED}
    return fingerprint(
        [zipc.__version__, EMISSION, *map(version, LIBRARIES)],
        [field.name for field in dataclasses.fields(ProfileResult)],
        asked,
        dataclasses.asdict(target),
        prints,
        [(str(path.relative_to(folder)), sha256_file(path)) for path in files],
    )


def _recall(root: Path, key: str | None) -> ProfileResult | None:
    """What was said when the same was asked before, if its table is still the same."""
    folder = None if key is None else StageCache(root).get(STAGE, key)
    if folder is None:
        return None
    held = json.loads((folder / FILE).read_text())
    path = root / held["result"]["table_path"]
    own = path.is_relative_to(root) and path.is_file()
    if not own or sha256_file(path) != held["table_sha256"]:
        return None
    again = {"table_path": path, "seconds": 0.0, "from_cache": True}
    return ProfileResult(**(held["result"] | again))
