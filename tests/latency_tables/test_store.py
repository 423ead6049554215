from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zipc.core.errors import CorruptFile, UsageError
from zipc.core.files import fingerprint as digest_of
from zipc.core.files import read_json, write_json
from zipc.core.types import Level, Workload
from zipc.latency_tables.correction import Correction
from zipc.latency_tables.store import TableStore, default_cache_dir, differences, read_table
from zipc.latency_tables.table import SCHEMA_VERSION, Entry, LatencyTable

FINGERPRINT = {"cpu": "EPYC", "isa": ["avx2"], "runtime_version": "1.20.0"}


@pytest.fixture
def store(tmp_path: Path) -> TableStore:
    return TableStore(tmp_path)


@pytest.fixture
def table() -> LatencyTable:
    entries = [
        Entry(
            signature="ffn:384",
            level=Level(width, "int8-dynamic"),
            samples_ms=(0.1 * width, 0.3),
            anchor_ms=(1.0, 1.1),
        )
        for width in (32, 64)
    ]
    return LatencyTable(
        target="cpu",
        runtime="onnxruntime",
        workload=Workload(1, 128, 1),
        fingerprint=FINGERPRINT,
        state={"load_average": [0.1]},
        correction=Correction(points=((0.5, 0.55), (0.3, 0.36)), errors=(0.1, 0.2)),
    ).with_entries(entries)


@pytest.fixture
def saved(store: TableStore, table: LatencyTable) -> Path:
    path = store.path("cpu", table.workload, "onnxruntime", "minilm-abc")
    store.save(table, path)
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_saved_table_comes_back_equal(
    store: TableStore, table: LatencyTable, saved: Path
) -> None:
    assert store.load(saved) == table


def test_an_absent_table_is_none(store: TableStore) -> None:
    path = store.path("cpu", Workload(), "onnxruntime", "other")
    assert store.load(path) is None


def test_paths_differ_by_target_workload_runtime_and_model_and_stay_inside(
    store: TableStore,
) -> None:
    paths = {
        store.path("cpu", Workload(), "onnxruntime", "m"),
        store.path("orin", Workload(), "onnxruntime", "m"),
        store.path("cpu", Workload(8), "onnxruntime", "m"),
        store.path("cpu", Workload(), "openvino", "m"),
        store.path("cpu", Workload(), "onnxruntime", "n"),
    }
    assert len(paths) == 5
    hostile = store.path("../..", Workload(), "a/b", "../../etc/passwd")
    assert hostile.resolve().is_relative_to(store.root.resolve())


def test_fields_of_two_fingerprints_that_differ_are_named() -> None:
    here = FINGERPRINT | {"runtime_version": "1.21.0", "governor": "powersave"}
    assert differences(FINGERPRINT, here) == [
        "governor: 'absent' → 'powersave'",
        "runtime_version: '1.20.0' → '1.21.0'",
    ]
    assert differences(here, here) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_corrupt(store: TableStore, saved: Path, share: float) -> None:
    text = saved.read_text()
    saved.write_text(text[: int(len(text) * share)])
    with pytest.raises(CorruptFile, match=saved.name):
        store.load(saved)


def test_a_file_nested_without_end_is_corrupt(store: TableStore, saved: Path) -> None:
    saved.write_text("[" * 200_000)
    with pytest.raises(CorruptFile, match=saved.name):
        store.load(saved)


def test_a_file_of_something_else_is_not_to_be_deleted(saved: Path) -> None:
    saved.write_text('{"zipc_version": "0.1.0"}')
    for path in (saved, saved.with_name("nowhere.json"), saved.parent):
        with pytest.raises(CorruptFile, match="zipc tables list") as caught:
            read_table(path)
        assert "Delete" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.onnx", "config.json"])
def test_what_was_no_table_is_not_to_be_deleted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"hidden_size": \xff\x00')
    with pytest.raises(CorruptFile, match="It is not a latency table") as caught:
        read_table(tmp_path / name)
    assert "Delete" not in str(caught.value)


def test_a_damaged_table_is_to_be_deleted_wherever_it_lies(saved: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "exported.json"
    elsewhere.write_text(saved.read_text()[:200])
    saved.write_text("")
    for path in (saved, elsewhere):
        with pytest.raises(CorruptFile, match="Delete it and run zipc profile again"):
            read_table(path)


def test_tables_of_one_name_are_named_by_their_targets_or_paths(
    store: TableStore, table: LatencyTable, saved: Path
) -> None:
    other = store.path("cpu@board", table.workload, "onnxruntime", saved.stem)
    store.save(table, other)
    with pytest.raises(UsageError, match="may mean 2 tables") as caught:
        store.find(saved.stem)
    names = [f"{target}/minilm-abc@b1s128t1" for target in ("cpu", "cpu@board")]
    assert all(name in str(caught.value) for name in names)
    assert [store.find(name) for name in names] == [saved, other]
    third = store.path("cpu", table.workload, "openvino", saved.stem)
    store.save(table, third)
    with pytest.raises(UsageError, match="may mean 3 tables") as caught:
        store.find(saved.stem)
    assert all(str(path) in str(caught.value) for path in (saved, other, third))


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0, 1e300, True, "fast", "0.01", None])
def test_an_impossible_sample_names_its_entry(store: TableStore, saved: Path, value: Any) -> None:
    edit(saved, lambda d: d["entries"][1]["samples_ms"].__setitem__(0, value))
    with pytest.raises(CorruptFile, match="ffn:384 at 64@int8-dynamic"):
        store.load(saved)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["entries"][0]["level"].update(numeric="fp7"), "no numeric 'fp7'"),
        (lambda d: d["entries"][0]["level"].update(width=10**10), "a width is 0 to"),
        (lambda d: d["entries"][0].update(signature="ffn\x1b[2J"), "signature: .* control char"),
        (lambda d: d.update(target=""), "target: String should"),
        (lambda d: d.update(runtime=""), "runtime: String should"),
    ],
)
def test_a_table_of_nothing_that_exists_is_corrupt_even_with_a_digest(
    store: TableStore, saved: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    document = read_json(saved)
    del document["digest"]
    change(document)
    write_json(saved, document | {"digest": digest_of(document)})
    with pytest.raises(CorruptFile, match=said) as caught:
        store.load(saved)
    assert "\x1b" not in str(caught.value)


def test_empty_samples_name_their_entry(store: TableStore, saved: Path) -> None:
    edit(saved, lambda d: d["entries"][0].update(samples_ms=[], anchor_ms=[]))
    with pytest.raises(CorruptFile, match="ffn:384 at 32@int8-dynamic"):
        store.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["entries"][0]["samples_ms"].__setitem__(0, 0.001),
        lambda d: d["correction"].update(surplus={"each": 1.0}),
        lambda d: d["fingerprint"].update(cpu="Xeon"),
        lambda d: d.pop("digest"),
    ],
)
def test_a_plausible_edit_by_hand_is_found(
    store: TableStore, saved: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(saved, change)
    with pytest.raises(CorruptFile, match="edited by hand"):
        store.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(entries="none"),
        lambda d: d.update(entries=[3]),
        lambda d: d["entries"][0].update(level=7),
        lambda d: d["entries"][0].pop("signature"),
        lambda d: d["entries"].append(d["entries"][0]),
        lambda d: d.pop("workload"),
        lambda d: d.update(surprise=1),
        lambda d: d.update(schema_version="one"),
    ],
)
def test_a_malformed_table_is_corrupt(
    store: TableStore, saved: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(saved, change)
    with pytest.raises(CorruptFile, match="zipc profile"):
        store.load(saved)


def test_a_newer_schema_asks_for_an_upgrade(store: TableStore, saved: Path) -> None:
    edit(saved, lambda d: d.update(schema_version=SCHEMA_VERSION + 1, unheard_of=True))
    with pytest.raises(CorruptFile, match="Take a newer zipc"):
        store.load(saved)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_tables_of_older_schemas_keep_their_prices_and_are_checked_anew(
    version: int, store: TableStore, table: LatencyTable, saved: Path
) -> None:
    document = read_json(saved)
    del document["digest"]
    document["schema_version"] = version
    document["correction"] = {"intercept": 0.1, "slope": 0.9, "points": [[0.5, 0.6]]}
    document["in_place"] = document["entries"][:1]
    if version == 1:
        del document["in_place"]
    write_json(saved, document | {"digest": digest_of(document)})
    found = store.load(saved)
    assert found == table.with_correction(None)


def test_a_failed_write_leaves_the_old_table(
    store: TableStore, table: LatencyTable, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        store.save(table.with_note("new"), saved)
    assert store.load(saved) == table
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_the_cache_folder_obeys_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIPC_CACHE_DIR", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here"
    monkeypatch.delenv("ZIPC_CACHE_DIR")
    assert default_cache_dir().name == "zipc"


def test_a_user_without_a_home_is_asked_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("ZIPC_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UsageError, match="--cache-dir"):
        default_cache_dir()
