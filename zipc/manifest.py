"""OUT/manifest.json: what was asked, what was done, and what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

import zipc
from zipc.core.errors import CorruptFile
from zipc.core.files import read_json, sha256_file, write_json
from zipc.core.request import Request
from zipc.core.types import Artifact, LeftAlone, Level, TableKind, VerdictName
from zipc.core.workload import WorkloadField
from zipc.profiler.agent import TITLES

SCHEMA_VERSION = 3  # raised by every change of a field below
FILE_NAME = "manifest.json"
TENSORRT = "tensorrt"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Runtime = Annotated[str, Field(pattern="^(onnxruntime|openvino|torch|torch-cuda|tensorrt)$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """A part of the manifest: no unknown fields, no changes after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecord(Record):
    source: str  # as the user named it, or the hub id it stands for
    sha256: Sha256  # of the weights
    revision: str | None = None


class RequestRecord(BaseModel):
    """The request without its machine's paths; `of` makes it from a `Request`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str
    speedup: Positive | None = None
    latency_ms: Positive | None = None
    max_drop: NotNegative | None = None
    numerics: str = "auto"

    @classmethod
    def of(cls, request: Request) -> Self:
        fields = dataclasses.asdict(request)
        kept = {k: v for k, v in fields.items() if k not in ("output", "cache_dir")}
        kept["input_shapes"] = [str(spec) for spec in request.input_shapes]
        return cls.model_validate({k: list(v) if type(v) is tuple else v for k, v in kept.items()})


class AllocationRecord(Record):
    site: str
    level: Level
    units: Count | None = None  # of the dense site, so that the width can be read against it
    predicted_ms: NotNegative | None = None
    error: NotNegative | None = None


class ByDefaultRecord(Record):
    """The speedup with as many threads as the runtime takes by itself."""

    speedup: Positive
    speedup_ci95: tuple[Positive, Positive]
    processors: Count
    promised: bool  # or only told: the request was for a number of threads, or for a latency


class LatencyRecord(Record):
    """Null where nothing was measured: a `predicted` verdict has no `compiled_ms`."""

    table_kind: TableKind
    predicted_ms: Positive | None = None
    reference_ms: Positive | None = None
    compiled_ms: Positive | None = None
    p90_ms: Positive | None = None
    p99_ms: Positive | None = None
    speedup: Positive | None = None
    speedup_ci95: tuple[Positive, Positive] | None = None
    speedup_vs_best_dense: Positive | None = None
    by_default: ByDefaultRecord | None = None
    pairs: Count | None = None
    prediction_error: Finite | None = None  # predicted / measured latency ratio to dense, minus 1
    fingerprint: dict[str, JsonValue] = Field(default_factory=dict)
    session_options: dict[str, JsonValue] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.speedup is not None and self.speedup_ci95 is not None:
            low, high = self.speedup_ci95
            if not low <= self.speedup <= high:
                raise ValueError(f"a speedup of {self.speedup:g} outside its interval")
        return self


class QualityRecord(Record):
    metric: str
    split: str  # which rows were read, e.g. "test"
    dense: Finite
    compiled: Finite | None = None  # read from OUT/model.onnx itself
    one_shot: Finite | None = None
    recovered: Finite | None = None
    interval: tuple[Finite, Finite] | None = None  # 95 %, paired bootstrap of compiled - dense
    rows: Count | None = None
    batch_deviation: Finite | None = None  # a sentence alone against the same one in a batch
    notes: tuple[str, ...] = ()


class SizeRecord(Record):
    dense_mb: Positive
    compiled_mb: Positive
    dense_params: Count | None = None
    compiled_params: Count | None = None


class DataRecord(Record):
    source: str
    sha256: Sha256
    rows: dict[str, Count]  # split -> rows
    description: str = ""


class Manifest(Record):
    """The contract of the output folder; tests and other programs rely on its names."""

    schema_version: int = SCHEMA_VERSION
    zipc_version: str = zipc.__version__
    target: str
    runtime: Runtime = "onnxruntime"  # schema 1 did not say; nothing else could be timed
    workload: WorkloadField
    model: ModelRecord
    request: RequestRecord
    allocation: tuple[AllocationRecord, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    latency: LatencyRecord
    verdict: VerdictName
    quality: QualityRecord | None = None
    size: SizeRecord
    data: DataRecord | None = None
    files: tuple[Artifact, ...]
    timings_s: dict[str, NotNegative]
    stage_keys: dict[str, str] = Field(default_factory=dict)  # stage -> key in the user cache
    seed: int
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        """Write atomically to `path`, an output folder or the JSON file itself."""
        write_json(_file(path), self.to_json())

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def changed_files(self, out: Path) -> list[str]:
        """Files of `out` that are missing or not those the manifest describes."""
        return _changed(self.files, out)

    @classmethod
    def read(cls, out: Path) -> Self:
        """Read the manifest of a finished compile.

        Raises:
            CorruptFile: missing, truncated, of a newer schema, or edited into another shape.
        """
        path = _file(out)
        if not path.is_file():
            raise CorruptFile(
                f"{out} is not a finished compile: it has no {FILE_NAME}. "
                f"Run: zipc compile MODEL --data DATA -o {out}"
            )
        document = read_json(path, advice=_AGAIN)
        _check_schema(document, path)
        try:
            return cls.model_validate_json(path.read_bytes(), strict=True)
        except ValidationError as error:
            raise CorruptFile(f"{path} is damaged: {_first(error)}. {_AGAIN}") from error


def refuse_changed(files: Iterable[Artifact], out: Path) -> None:
    """Refuse files of `out` that are not the recorded ones.

    Raises:
        CorruptFile: one is missing, or has another hash.
    """
    changed = _changed(files, out)
    if changed:
        raise CorruptFile(
            f"{out}: {', '.join(changed)} changed since the compile, or is missing. Compile again."
        )


def recorded_runtime(document: Any) -> str:
    """What runs the graphs of a manifest, as it stands; modelled devices run TensorRT.

    Raises:
        CorruptFile: nothing that zipc knows.
    """
    modelled = latency_of(document).get("table_kind") == "modelled"
    if modelled or document.get("verdict") == "predicted":
        return TENSORRT
    name = document.get("runtime", "onnxruntime")
    if name not in (*TITLES, TENSORRT):
        raise CorruptFile(f"The manifest names the runtime {name!r}. Compile again.")
    return str(name)


def latency_of(document: Any) -> Any:
    """The latency of a manifest as it stands; {} where it has none."""
    latency = document.get("latency")
    return latency if isinstance(latency, dict) else {}


_AGAIN = "Run the same zipc compile again to write it anew."


def _file(path: Path) -> Path:
    return path if path.suffix == ".json" else path / FILE_NAME


def _changed(files: Iterable[Artifact], out: Path) -> list[str]:
    return [
        file.path
        for file in files
        if not (out / file.path).is_file() or sha256_file(out / file.path) != file.sha256
    ]


def _check_schema(document: Any, path: Path) -> None:
    found = document.get("schema_version") if isinstance(document, dict) else None
    if type(found) is not int:
        raise CorruptFile(f"{path} is damaged: it has no schema_version. {_AGAIN}")
    if found > SCHEMA_VERSION:
        raise CorruptFile(
            f"{path} has schema {found}, this zipc reads up to {SCHEMA_VERSION}. "
            "Take a newer zipc, or compile again."
        )


def _first(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    where = ".".join(str(part) for part in problems[0]["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {problems[0]['msg']}{more}"
