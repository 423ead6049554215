"""Prices of a decode step whose weights fit no cache: each part finds its own in memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from tests.tiny_folders import family_folder
from tests.tiny_project import fake_clock
from zipc import pricing
from zipc.cold import UNKNOWN_CACHE, cache_filler, last_cache, product_of_one_row
from zipc.core.request import Request
from zipc.core.types import Silent, Workload
from zipc.groundwork import Priced, price_model
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.profiler.runners.session import SessionRunner

DECODE = Workload(sequence_length=1, past_length=15)


def device(*, gets: int = 32 << 20, **changed: Any) -> Any:
    """One whose programs get so many bytes of the last cache, and read twice as fast from it."""
    told: dict[str, Any] = {"caches": ["L2 1024K", "L3 491520K"]}

    def load(graph: bytes, *, workload: Workload) -> Any:
        size = weights_of(graph)
        return SimpleNamespace(run=lambda: size * (1.0 if size <= gets else 2.0))

    facts: dict[str, Any] = {"kind": "measured", "runtime": "onnxruntime"} | changed
    timer = SimpleNamespace(load=load)
    return SimpleNamespace(fingerprint=lambda: told, timer=lambda: timer, **facts)


def weights_of(graph: bytes) -> int:
    (shape,) = onnx.load_from_string(graph).graph.initializer
    return 4 * int(onnx.numpy_helper.to_array(shape).prod())


@pytest.mark.parametrize(
    ("told", "size"),
    [
        (["L1 48K", "L3 32768K"], 32 << 20),
        (["L3 96M"], 96 << 20),
        ([], UNKNOWN_CACHE),
        (["L3"], UNKNOWN_CACHE),
        (["L3 lots"], UNKNOWN_CACHE),
    ],
)
def test_the_last_cache_is_as_large_as_the_system_tells(told: list[str], size: int) -> None:
    assert last_cache(told) == size


@pytest.mark.parametrize(
    ("model", "gets", "filler"),
    [
        (800, 32, 50),
        (800, 100, 200),
        (4000, 100, 120),  # of twice what the system tells
        (33, 32, 33),
    ],
)
def test_the_filler_is_the_smallest_that_is_read_from_memory(
    model: float, gets: float, filler: float
) -> None:
    found = cache_filler(device(gets=int(gets * 2**20)), DECODE, int(model * 2**20))
    assert found is not None
    assert weights_of(found) == pytest.approx(filler * 2**20, rel=0.01)


@pytest.mark.parametrize("size", [1, 1 << 16])
def test_a_filler_runs_whatever_the_workload(size: int) -> None:
    assert OnnxRuntimeRunner(product_of_one_row(size), workload=DECODE).run() > 0


@pytest.mark.parametrize(
    ("changed", "workload", "size"),
    [
        ({}, DECODE, 32 << 20),  # fits
        ({"gets": 1 << 40}, DECODE, 1 << 30),  # as fast from memory
        ({"gets": 1 << 20}, DECODE, 1 << 30),  # parts of a few MB alone read memory, too
        ({"gets": 1 << 20}, DECODE, 1 << 20),
        ({}, Workload(), 1 << 30),  # many rows for every weight
        ({"kind": "modelled"}, DECODE, 1 << 30),
        ({"runtime": "tensorrt"}, DECODE, 1 << 30),
    ],
)
def test_what_does_not_wait_for_memory_is_timed_warm(
    changed: dict[str, Any], workload: Workload, size: int
) -> None:
    assert cache_filler(device(**changed), workload, size) is None


def priced(folder: Path) -> Priced:
    model = str(family_folder(folder, "llama"))
    asked = Request(model=model, phase="decode", past_length=15, cache_dir=folder / "cache")
    return price_model(asked, progress=Silent())


def test_a_decode_step_beyond_the_cache_has_a_table_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_clock(monkeypatch)
    ran: list[bool] = []
    timed = SessionRunner.run

    def run(self: SessionRunner) -> float:
        ran.append("filler" in self._feeds)
        return timed(self)

    monkeypatch.setattr(SessionRunner, "run", run)
    warm = priced(tmp_path).prices
    assert not any(ran)
    monkeypatch.setattr(pricing, "cache_filler", lambda *_: product_of_one_row(1 << 15))
    found = priced(tmp_path).prices
    assert sum(ran) > len(found.table.entries)
    assert found.path != warm.path
    again = priced(tmp_path).prices
    assert again.from_cache
    assert again.path == found.path
