"""Prices between profiled workloads: exact where they are straight, and honest where not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.price_tables import made
from zipc.core.errors import UsageError
from zipc.core.types import Level, Workload
from zipc.latency_tables.interpolate import interpolate
from zipc.latency_tables.table import LatencyTable

HALF, FULL = ("ffn-8", Level(4)), ("ffn-8", Level(8))


def at(workload: Workload, cost: Callable[[float], float]) -> LatencyTable:
    """A table whose prices grow with tokens as `cost`; half the width takes half the time."""
    tokens = workload.batch_size * (workload.sequence_length or 1)
    return made({(4, "fp32"): cost(tokens) / 2, (8, "fp32"): cost(tokens)}, workload=workload)


def lengths(*sizes: int, cost: Callable[[float], float], batch: int = 1) -> list[LatencyTable]:
    return [at(Workload(batch, size), cost) for size in sizes]


def test_straight_prices_come_out_exactly_and_so_does_their_error() -> None:
    found = interpolate(lengths(256, 64, 128, cost=lambda n: 0.1 + n / 100), Workload(1, 96))
    assert found.between == (Workload(1, 64), Workload(1, 128))
    assert found.prices[FULL] == pytest.approx(1.06, abs=1e-4)
    assert found.prices[HALF] == pytest.approx(0.53, abs=1e-4)
    assert [held.workload for held in found.held_out] == [Workload(1, 128)]
    assert found.median_error == pytest.approx(0, abs=1e-4)


def test_the_error_is_that_of_a_workload_left_out() -> None:
    """A square: 128² is 16384; on the line between 64² and 256² it is 25 % more at 64 of 192."""
    found = interpolate(lengths(64, 128, 256, cost=lambda n: n * n / 1e4), Workload(1, 200))
    on_line = (64**2 + (256**2 - 64**2) / 3) / 128**2 - 1
    assert found.error(FULL) == pytest.approx(on_line, rel=1e-3)
    assert found.held_out[0].worst_error == pytest.approx(on_line, rel=1e-3)


def test_of_two_axes_the_one_that_is_off_by_less_is_taken() -> None:
    def cost(workload: Workload) -> float:  # straight in the batch, not in the length
        return workload.batch_size * (workload.sequence_length or 1) ** 2 / 1e4

    sizes = [(1, 100), (2, 100), (4, 100), (3, 50), (3, 120), (3, 200)]
    tables = [made({(8, "fp32"): cost(w)}, workload=w) for w in (Workload(*s) for s in sizes)]
    found = interpolate(tables, Workload(3, 100))
    assert found.between == (Workload(2, 100), Workload(4, 100))
    assert found.prices[FULL] == pytest.approx(3.0, rel=1e-3)


def test_a_decode_step_lies_between_past_lengths_and_images_between_batches() -> None:
    steps = [made({(8, "fp32"): p / 10}, workload=Workload(1, 1, 1, {}, p)) for p in (10, 20, 40)]
    assert interpolate(steps, Workload(1, 1, 1, {}, 30)).prices[FULL] == pytest.approx(3.0)
    images = [Workload(b, None, 1, {"x": (b, 3, 8, 8)}) for b in (1, 2, 8, 4)]
    tables = [made({(8, "fp32"): float(w.batch_size)}, workload=w) for w in (*images[:3],)]
    assert interpolate(tables, images[3]).prices[FULL] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("sizes", "asked", "message"),
    [
        ((64, 128, 256), 512, "not between"),
        ((64, 128, 256), 32, "not between"),
        ((64, 256), 128, "error could not be told.*zipc profile MODEL"),
        ((64, 128, 256), 128, "zipc tables show KEY@b1s128t1"),
    ],
)
def test_what_cannot_be_known_is_refused(sizes: tuple[int, ...], asked: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        interpolate(lengths(*sizes, cost=lambda n: n), Workload(1, asked))


def test_other_devices_threads_and_batches_do_not_count() -> None:
    tables = lengths(64, 128, cost=lambda n: n)
    for other in (Workload(2, 256), Workload(1, 256, 2)):
        with pytest.raises(UsageError, match="not between"):
            interpolate([*tables, at(other, lambda n: n)], Workload(1, 96))
    elsewhere = made({(8, "fp32"): 1.0}, workload=Workload(1, 256), fingerprint={"cpu": "two"})
    with pytest.raises(UsageError, match="one device"):
        interpolate([*tables, elsewhere], Workload(1, 96))
