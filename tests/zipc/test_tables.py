"""`zipc tables`: what is kept, and files of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Run, command_line
from zipc.core.types import Level, Workload
from zipc.latency_tables.compare import compare, dominated
from zipc.latency_tables.store import TableStore, read_table
from zipc.latency_tables.table import Entry, LatencyTable

PRICES = {(8, "fp32"): 0.8, (4, "fp32"): 0.5, (2, "fp32"): 0.6, (4, "int8-static"): 0.2}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return command_line(capsys)


def made(prices: dict[tuple[int, str], float] = PRICES, **changes: Any) -> LatencyTable:
    """A table with an anchor of 2 ms."""
    entries = [
        Entry(
            signature="ffn-8",
            level=Level(width, numeric),
            samples_ms=(ms, ms, ms),
            anchor_ms=(2.0, 2.0, 2.0),
        )
        for (width, numeric), ms in prices.items()
    ]
    fields = {
        "target": "cpu",
        "runtime": "onnxruntime",
        "workload": Workload(1, 16, 1),
        "fingerprint": {"cpu": "one"},
        "anchor": "a",
    }
    return LatencyTable(**(fields | changes)).with_entries(entries)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder with two tables."""
    store = TableStore(tmp_path / "cache" / "tables")
    for name, changes in (("first", {}), ("second", {"fingerprint": {"cpu": "two"}})):
        table = made(**changes)
        store.save(table, store.path("cpu", table.workload, table.runtime, name))
    return tmp_path / "cache"


def test_a_level_is_idle_where_a_wider_one_costs_no_more() -> None:
    assert dominated(made()) == {("ffn-8", Level(2, "fp32")): 4}


def test_tables_are_compared_by_their_ratios_to_the_anchor() -> None:
    slower = {key: 2 * ms for key, ms in PRICES.items()} | {(1, "fp32"): 0.1}
    other = made(slower, fingerprint={"cpu": "two"})
    found = compare(made(), other)
    assert found.fingerprint == ("cpu: 'one' → 'two'",)
    assert (found.only_first, found.only_second, len(found.pairs)) == (0, 1, 4)
    assert [p.ratio for p in found.pairs] == pytest.approx([2.0] * 4)
    assert found.median_difference == pytest.approx(1.0)
    nothing = compare(made(), made({(3, "fp32"): 1.0}))
    assert (nothing.pairs, nothing.median_difference) == ((), None)


def test_tables_of_other_anchors_are_compared_in_milliseconds() -> None:
    (pair,) = compare(made({(8, "fp32"): 0.8}), made({(8, "fp32"): 0.4}, anchor="b")).pairs
    assert (pair.first_ms, pair.second_ms) == pytest.approx((0.8, 0.4))
    assert pair.ratio == pytest.approx(0.5)


def test_list_names_what_is_kept_and_what_is_damaged(run: Run, cache: Path) -> None:
    (folder,) = (cache / "tables").glob("*/*")
    (folder / "third.json").write_text("{")
    code, out, _ = run("tables", "list", "--cache-dir", str(cache), "--format", "json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["tables"]}
    assert rows["first"]["entries"] == len(PRICES)
    assert rows["third"]["error"] is not None
    code, out, _ = run("tables", "list", "--cache-dir", str(cache))
    assert {"first", "damaged:"} <= set(out.split())


def test_an_empty_cache_says_how_to_make_a_table(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("tables", "list", "--cache-dir", str(tmp_path / "none"))
    assert (code, "zipc profile MODEL" in out) == (0, True)


def test_show_draws_every_level(run: Run, cache: Path) -> None:
    code, out, _ = run("tables", "show", "fir", "--cache-dir", str(cache))
    assert code == 0
    assert "no faster than 4" in out
    code, out, _ = run("tables", "show", "first", "--cache-dir", str(cache), "--format", "json")
    prices = json.loads(out)["prices"]
    assert {(p["width"], p["numeric"]): p["ms"] for p in prices} == pytest.approx(PRICES)


@pytest.mark.parametrize("name", ["nothing", ""])
def test_a_name_must_mean_one_table(run: Run, cache: Path, name: str) -> None:
    code, _, err = run("tables", "show", name, "--cache-dir", str(cache))
    assert code == 2
    assert "zipc tables list" in err


def test_export_and_merge_write_new_files_only(run: Run, cache: Path, tmp_path: Path) -> None:
    here = ["--cache-dir", str(cache)]
    whole, prices, joined = (tmp_path / n for n in ("whole.json", "prices.csv", "joined.json"))
    assert run("tables", "export", "first", "-o", str(whole), *here)[0] == 0
    assert read_table(whole).entries == made().entries
    assert run("tables", "export", "first", "-o", str(prices), *here)[0] == 0
    rows = list(csv.DictReader(prices.open()))
    assert {(int(r["width"]), r["numeric"]): float(r["ms"]) for r in rows} == pytest.approx(PRICES)
    code, _, err = run("tables", "export", "first", "-o", str(whole), *here)
    assert (code, "exists already" in err) == (2, True)
    assert run("tables", "export", "first", "-o", str(tmp_path / "x.txt"), *here)[0] == 2
    assert run("tables", "merge", "first", str(whole), "-o", str(joined), *here)[0] == 0
    assert read_table(joined).entries == made().entries
    joined.unlink()
    code, _, err = run("tables", "merge", "first", "second", "-o", str(joined), *here)
    assert (code, "they differ in fingerprint" in err) == (2, True)
    assert not joined.exists()
    assert run("tables", "merge", "first", "-o", str(joined), *here)[0] == 2


def test_diff_says_what_differs(run: Run, cache: Path) -> None:
    here = ["--cache-dir", str(cache)]
    code, out, _ = run("tables", "diff", "first", "second", *here)
    assert code == 0
    assert "cpu: 'one' → 'two'" in out
    code, out, _ = run("tables", "diff", "first", "second", *here, "--format", "json")
    assert json.loads(out)["median_difference"] == 0


def test_validate_fails_for_an_edited_table(run: Run, cache: Path) -> None:
    first, second = sorted((cache / "tables").rglob("*.json"))
    assert run("tables", "validate", str(first), str(second))[0] == 0
    second.write_text(second.read_text().replace('"cpu": "two"', '"cpu": "three"'))
    code, out, _ = run("tables", "validate", str(first), str(second), "--format", "json")
    document = json.loads(out)
    assert (code, document["ok"]) == (2, False)
    assert "edited by hand" in document["tables"][1]["error"]
