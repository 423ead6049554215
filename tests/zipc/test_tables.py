"""`zipc tables`: what is kept, and files of it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.command_line import Run
from tests.price_tables import made
from zipc.cli.tables_printing import show_list
from zipc.core.types import Level, Workload
from zipc.latency_tables.compare import compare, dominated
from zipc.latency_tables.store import TableStore, read_table

PRICES = {(8, "fp32"): 0.8, (4, "fp32"): 0.5, (2, "fp32"): 0.6, (4, "int8-static"): 0.2}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder with two tables."""
    store = TableStore(tmp_path / "cache" / "tables")
    for name, changes in (("first", {}), ("second", {"fingerprint": {"cpu": "two"}})):
        table = made(PRICES, **changes)
        table = table.with_entries(made({(2, "fp32"): 0.5}).entries, in_place=True)
        store.save(table, store.path("cpu", table.workload, table.runtime, name))
    return tmp_path / "cache"


def test_a_level_is_idle_where_a_wider_one_costs_no_more() -> None:
    assert dominated(made(PRICES)) == {("ffn-8", Level(2, "fp32")): 4}


def test_tables_are_compared_by_their_ratios_to_the_anchor() -> None:
    slower = {key: 2 * ms for key, ms in PRICES.items()} | {(1, "fp32"): 0.1}
    other = made(slower, fingerprint={"cpu": "two"})
    found = compare(made(PRICES), other)
    assert found.fingerprint == ("cpu: 'one' → 'two'",)
    assert (found.only_first, found.only_second, len(found.pairs)) == (0, 1, 4)
    assert [p.ratio for p in found.pairs] == pytest.approx([2.0] * 4)
    assert found.median_difference == pytest.approx(1.0)
    nothing = compare(made(PRICES), made({(3, "fp32"): 1.0}))
    assert (nothing.pairs, nothing.median_difference) == ((), None)


def test_tables_of_other_anchors_are_compared_in_milliseconds() -> None:
    (pair,) = compare(made({(8, "fp32"): 0.8}), made({(8, "fp32"): 0.4}, anchor="b")).pairs
    assert (pair.first_ms, pair.second_ms) == pytest.approx((0.8, 0.4))
    assert pair.ratio == pytest.approx(0.5)


def test_tables_of_other_workloads_are_compared_in_milliseconds_and_said_to_be() -> None:
    longer = made({(8, "fp32"): 1.2}, workload=Workload(1, 32))
    found = compare(made({(8, "fp32"): 0.8}), longer)
    assert found.pairs[0].ratio == pytest.approx(1.5)
    assert ["workload" in line and "32" in line for line in found.setting] == [True]


def test_list_names_what_is_kept_and_what_is_damaged(run: Run, cache: Path) -> None:
    (folder,) = (cache / "tables").glob("*/*")
    (folder / "third.json").write_text("{")
    code, out, _ = run("tables", "list", "--cache-dir", str(cache), "--format", "json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["tables"]}
    assert rows["first"]["entries"] == len(PRICES)
    assert rows["third"]["error"] is not None
    code, out, _ = run("tables", "list", "--cache-dir", str(cache))
    assert "first@b1s16t1" in out.split()
    assert "not read: " in out


@pytest.mark.parametrize("width", [30, 50, 60, 80, 100, 120, 200])
def test_names_of_tables_stay_whole_in_a_narrow_terminal(run: Run, cache: Path, width: int) -> None:
    store = TableStore(cache / "tables")
    load = Workload(4, None, 1, {"pixel_values": (4, 3, 224, 224)})
    long = made(PRICES, workload=load, target="orin-nano:15w")
    path = store.path("orin-nano:15w", load, long.runtime, "third")
    store.save(long, path)
    page = io.StringIO()
    _, out, _ = run("tables", "list", "--cache-dir", str(cache), "--format", "json")
    show_list(Console(file=page, width=width), json.loads(out))
    lines = page.getvalue().splitlines()
    assert lines[0].split()[0] == "name"
    assert {f"third@{load.key}", "first@b1s16t1"} <= {line.split(" ")[0] for line in lines}
    assert sum("orin-nano:15w" in line for line in lines) == 1
    assert len(lines) == 4 if width in (30, 50, 200) else len(lines) < 12
    assert ("pixel_values" in page.getvalue().split()) == (width >= 100)


def test_a_file_is_no_cache(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("tables", "list", "--cache-dir", str(tmp_path / "file"))
    assert code == 2
    assert "is not a folder" in err


def test_an_empty_cache_says_how_to_make_a_table(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("tables", "list", "--cache-dir", str(tmp_path / "none"))
    assert (code, "zipc profile MODEL" in out) == (0, True)


def test_show_draws_every_level(run: Run, cache: Path) -> None:
    code, out, _ = run("tables", "show", "fir", "--cache-dir", str(cache))
    assert code == 0
    assert "no faster than 4" in out
    code, out, _ = run("tables", "show", "first", "--cache-dir", str(cache), "--format", "json")
    document = json.loads(out)
    prices = document["prices"]
    assert {(p["width"], p["numeric"]): p["ms"] for p in prices} == pytest.approx(PRICES)
    (placed,) = document["in_place"]
    assert (placed["width"], placed["ratio"]) == (2, pytest.approx(0.25))


@pytest.mark.parametrize("name", ["nothing", ""])
def test_a_name_must_mean_one_table(run: Run, cache: Path, name: str) -> None:
    code, _, err = run("tables", "show", name, "--cache-dir", str(cache))
    assert code == 2
    assert "zipc tables list" in err


def test_show_lists_the_workloads_of_a_model_and_draws_the_one_named(
    run: Run, cache: Path, tmp_path: Path
) -> None:
    store = TableStore(cache / "tables")
    table = made(PRICES, workload=Workload(8, 16, 1))
    store.save(table, store.path("cpu", table.workload, table.runtime, "first"))
    here = ["--cache-dir", str(cache), "--format", "json"]
    code, out, _ = run("tables", "show", "first", *here)
    keys = {row["workload_key"] for row in json.loads(out)["tables"]}
    assert (code, keys) == (0, {"b1s16t1", "b8s16t1"})
    code, out, _ = run("tables", "show", "first@b8s16t1", *here)
    assert (code, json.loads(out)["workload_key"]) == (0, "b8s16t1")
    png = tmp_path / "table.png"
    code, _, err = run("tables", "show", "first", "--png", str(png), "--cache-dir", str(cache))
    assert (code, "first@b8s16t1" in err, png.exists()) == (2, True, False)
    for taken, fault in ((tmp_path / "x.txt", "end in .png"), (tmp_path / "own.png", "exists")):
        (tmp_path / "own.png").write_text("mine")
        code, out, _ = run("tables", "show", "first@b8s16t1", "--png", str(taken), *here)
        assert (code, fault in out) == (2, True)
    assert (tmp_path / "own.png").read_text() == "mine"
    pytest.importorskip("matplotlib")
    assert run("tables", "show", "first@b8s16t1", "--png", str(png), *here)[0] == 0
    assert png.read_bytes().startswith(b"\x89PNG")


def test_tables_of_several_targets_are_named_by_theirs(run: Run, cache: Path) -> None:
    store = TableStore(cache / "tables")
    table = made({(8, "fp32"): 0.5})
    store.save(table, store.path("cpu@board", table.workload, table.runtime, "first"))
    here = ["--cache-dir", str(cache), "--format", "json"]
    code, out, _ = run("tables", "show", "first@b1s16t1", *here)
    message = json.loads(out)["error"]["message"]
    names = ("cpu/first@b1s16t1", "cpu@board/first@b1s16t1")
    assert code == 2
    assert all(name in message for name in names)
    for name, entries in zip(names, (len(PRICES), 1), strict=True):
        code, out, _ = run("tables", "show", name, *here)
        assert (code, json.loads(out)["entries"]) == (0, entries)


def test_interpolate_prints_prices_with_the_error_of_what_was_left_out(
    run: Run, tmp_path: Path
) -> None:
    store = TableStore(tmp_path / "tables")
    for length, ms in ((16, 1.0), (32, 2.2), (64, 4.0)):
        table = made({(8, "fp32"): ms}, workload=Workload(1, length))
        store.save(table, store.path("cpu", table.workload, table.runtime, "abc"))
    here = ["--cache-dir", str(tmp_path)]
    code, out, _ = run("tables", "interpolate", "abc", "1x48", *here, "--format", "json")
    document = json.loads(out)
    assert (code, document["workload"]) == (0, "batch 1, sequence 48, 1 thread")
    assert [p["ms"] for p in document["prices"]] == pytest.approx([3.1])
    assert document["held_out"][0]["median_error"] == pytest.approx(0.2 / 2.2, rel=1e-3)
    code, out, _ = run("tables", "interpolate", "abc", "1x48", *here)
    assert (code, "off by 9.1% (median)" in out, "3.10" in out) == (0, True, True)
    for size, message in (
        ("1x99", "not between"),
        ("ax", "batch x length"),
        ("1x8,1x9", "2 sizes"),
    ):
        code, _, err = run("tables", "interpolate", "abc", size, *here)
        assert (code, message in err) == (2, True)
    store.save(table, tmp_path / "file.json")
    code, _, err = run("tables", "interpolate", str(tmp_path / "file.json"), "1x48", *here)
    assert (code, "is one table" in err) == (2, True)


def test_outliers_are_told_beside_their_price(run: Run, tmp_path: Path) -> None:
    table = made({(8, "fp32"): 1.0})
    (steady,) = table.entries
    samples = (1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 9.0)
    spiky = steady.model_copy(update={"samples_ms": samples, "anchor_ms": (2.0,) * len(samples)})
    TableStore(tmp_path).save(table.with_entries([spiky]), tmp_path / "spiky.json")
    assert "12% outliers" in run("tables", "show", str(tmp_path / "spiky.json"))[1]


def test_export_and_merge_write_new_files_only(run: Run, cache: Path, tmp_path: Path) -> None:
    here = ["--cache-dir", str(cache)]
    whole, prices, joined = (tmp_path / n for n in ("whole.json", "prices.csv", "joined.json"))
    assert run("tables", "export", "first", "-o", str(whole), *here)[0] == 0
    assert read_table(whole).entries == made(PRICES).entries
    assert run("tables", "export", "first", "-o", str(prices), *here)[0] == 0
    rows = list(csv.DictReader(prices.open()))
    assert {(int(r["width"]), r["numeric"]): float(r["ms"]) for r in rows} == pytest.approx(PRICES)
    code, _, err = run("tables", "export", "first", "-o", str(whole), *here)
    assert (code, "exists already" in err) == (2, True)
    assert run("tables", "export", "first", "-o", str(tmp_path / "x.txt"), *here)[0] == 2
    assert run("tables", "merge", "first", str(whole), "-o", str(joined), *here)[0] == 0
    assert read_table(joined).entries == made(PRICES).entries
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
