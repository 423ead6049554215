"""The manifest: written and read back unchanged, and anything else refused by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from zipc.core.errors import CorruptFile, UsageError
from zipc.core.request import Request
from zipc.core.types import Artifact, LeftAlone, Level, Workload
from zipc.manifest import (
    SCHEMA_VERSION,
    AllocationRecord,
    LatencyRecord,
    Manifest,
    ModelRecord,
    QualityRecord,
    RequestRecord,
    SizeRecord,
)

SHA = "ab" * 32


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        target="cpu",
        workload=Workload(1, 128, 1),
        model=ModelRecord(source="minilm", sha256=SHA),
        request=RequestRecord.of(
            Request(model="minilm", speedup=2.0, include=("a*",), output=Path("/somewhere"))
        ),
        allocation=(
            AllocationRecord(site="layer.0.heads", level=Level(8, "int8-dynamic"), units=12),
            AllocationRecord(site="layer.0.ffn", level=Level(0), units=1536, error=0.25),
        ),
        left_alone=(LeftAlone("pooler", "not on the way to the output"),),
        latency=LatencyRecord(
            table_kind="measured", speedup=2.03, speedup_ci95=(2.01, 2.05), pairs=200
        ),
        verdict="validated",
        quality=QualityRecord(metric="spearman", split="test", dense=82.0, interval=(-0.4, 0.1)),
        size=SizeRecord(dense_mb=90.0, compiled_mb=24.0),
        files=(Artifact("model.onnx", "deployed", SHA),),
        timings_s={"evidence": 3.5},
        seed=0,
        versions={"torch": "2.13.0"},
    )


def test_manifest_reads_back_what_was_written(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert Manifest.read(tmp_path / "manifest.json") == manifest


def test_manifest_has_the_names_of_the_contract(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path / "manifest.json")
    document = json.loads((tmp_path / "manifest.json").read_text())
    assert document["schema_version"] == SCHEMA_VERSION
    assert document["workload"] == {"batch_size": 1, "sequence_length": 128, "threads": 1}
    assert document["request"]["speedup"] == 2.0
    assert document["allocation"][0]["level"] == {
        "width": 8,
        "numeric": "int8-dynamic",
        "pattern": "dense",
    }
    assert document["left_alone"][0]["path"] == "pooler"
    assert document["latency"]["speedup_ci95"] == [2.01, 2.05]
    assert document["latency"]["compiled_ms"] is None
    assert document["files"][0] == {"path": "model.onnx", "kind": "deployed", "sha256": SHA}


def test_request_record_leaves_out_paths_of_the_machine(manifest: Manifest) -> None:
    kept = manifest.request.model_dump()
    assert "output" not in kept
    assert "cache_dir" not in kept
    assert kept["include"] == ["a*"]


def test_manifest_refuses_an_infinite_time() -> None:
    with pytest.raises(ValidationError):
        LatencyRecord(table_kind="measured", compiled_ms=float("inf"))


def test_missing_manifest_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"not a finished compile.*Run: zipc compile"):
        Manifest.read(tmp_path / "nowhere")


def test_truncated_manifest_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(
        CorruptFile, match=r"manifest\.json cannot be read.*Run the same zipc compile"
    ):
        Manifest.read(tmp_path)


def test_newer_schema_asks_for_a_newer_zipc(manifest: Manifest, tmp_path: Path) -> None:
    _edit(manifest, tmp_path, lambda d: d.update(schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(CorruptFile, match=r"has schema 4.*Take a newer zipc"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(seed="seven"), "seed"),
        (lambda d: d["latency"].update(speedup="2.03"), r"latency\.speedup"),
        (lambda d: d["latency"].update(speedup=-1.0), r"latency\.speedup"),
        (lambda d: d["latency"].update(speedup_ci95=[2.0]), r"latency\.speedup_ci95"),
        (lambda d: d["latency"].update(speedup=9.9), r"latency: .* 9\.9 outside its interval"),
        (lambda d: d["allocation"][1]["level"].pop("width"), r"allocation\.1\.level\.width"),
        (lambda d: d["model"].update(sha256="short"), r"model\.sha256"),
        (lambda d: d.update(verdict="splendid"), "verdict"),
        (lambda d: d.update(speed=3), "speed"),
        (lambda d: d.pop("files"), "files"),
    ],
)
def test_edited_manifest_names_the_field(
    manifest: Manifest, tmp_path: Path, change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    _edit(manifest, tmp_path, change)
    with pytest.raises(CorruptFile, match=f"damaged: {named}"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '"manifest"', "{}", '{"schema_version": "1"}'])
def test_other_json_is_not_a_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CorruptFile, match="no schema_version"):
        Manifest.read(tmp_path)


def test_files_that_are_missing_or_others_are_named(manifest: Manifest, tmp_path: Path) -> None:
    content = b"graph"
    listed = tuple(
        Artifact(path, "model", hashlib.sha256(content).hexdigest())
        for path in ("same.onnx", "edited.onnx", "missing.onnx")
    )
    (tmp_path / "same.onnx").write_bytes(content)
    (tmp_path / "edited.onnx").write_bytes(b"other")
    made = manifest.model_copy(update={"files": listed})
    assert made.changed_files(tmp_path) == ["edited.onnx", "missing.onnx"]


def test_unwritable_folder_is_a_usage_error(manifest: Manifest, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UsageError, match="Cannot write"):
        manifest.write(blocker)


def _edit(manifest: Manifest, out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(json.dumps(manifest.to_json()))
    change(document)
    (out / "manifest.json").write_text(json.dumps(document))
