from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zipc.core.errors import TableMissing, UsageError
from zipc.core.types import Level, Workload
from zipc.latency_tables.correction import Correction
from zipc.latency_tables.table import Entry, LatencyTable

CHECKED = Correction(points=((0.5, 0.6),), errors=(0.1,))


def entry(width: int, samples: list[float], anchor: list[float], signature: str = "ffn") -> Entry:
    return Entry(
        signature=signature,
        level=Level(width),
        samples_ms=tuple(samples),
        anchor_ms=tuple(anchor),
    )


def table(*entries: Entry, **fields: object) -> LatencyTable:
    base = {
        "target": "cpu",
        "runtime": "onnxruntime",
        "workload": Workload(1, 128, 1),
        "fingerprint": {"cpu": "a"},
    }
    return LatencyTable(**(base | fields)).with_entries(entries)  # type: ignore[arg-type]


def test_price_is_ratio_times_the_anchor_of_the_whole_table() -> None:
    # The second site was measured while the machine ran at half speed.
    fast = entry(32, [3.0, 3.0, 3.0], [2.0, 2.0, 2.0])
    slow = entry(64, [8.0, 8.0], [4.0, 4.0])
    prices = table(fast, slow)
    assert prices.anchor_ms_p50 == 2.0
    assert prices.price("ffn", Level(32)) == pytest.approx(3.0)
    assert prices.price("ffn", Level(64)) == pytest.approx(4.0)


def test_ratio_is_pairwise_so_a_drift_in_one_entry_cancels() -> None:
    anchor = [1.0, 2.0, 4.0, 8.0]
    drifting = entry(32, [1.5 * a for a in anchor], anchor)
    assert drifting.ratio == pytest.approx(1.5)
    assert drifting.noise == pytest.approx(0.0, abs=1e-9)


def test_noise_is_the_standard_error_of_the_ratio_for_normal_samples() -> None:
    rng = random.Random(0)
    n = 400
    samples = [rng.gauss(2.0, 0.1) for _ in range(n)]
    measured = entry(32, samples, [1.0] * n)
    assert measured.noise == pytest.approx(stdev(samples) / fmean(samples) / math.sqrt(n), rel=0.2)


def test_outliers_stay_among_the_samples_and_raise_the_noise_but_not_the_ratio() -> None:
    rng = random.Random(1)
    clean = [rng.gauss(2.0, 0.02) for _ in range(20)]
    spiky = clean[:16] + [20.0] * 4
    before, after = entry(32, clean, [1.0] * 20), entry(32, spiky, [1.0] * 20)
    assert len(after.samples_ms) == 20
    assert after.outlier_share == pytest.approx(0.2)
    assert after.ratio == pytest.approx(before.ratio, rel=0.01)
    assert after.noise > 1.5 * before.noise


@pytest.mark.parametrize(
    ("samples", "anchor"),
    [
        ([], []),
        ([1.0], []),
        ([1.0, 2.0], [1.0]),
        ([math.nan], [1.0]),
        ([math.inf], [1.0]),
        ([-1.0], [1.0]),
        ([0.0], [1.0]),
        ([1.0], [math.nan]),
    ],
)
def test_impossible_samples_are_refused(samples: list[float], anchor: list[float]) -> None:
    with pytest.raises(ValidationError):
        entry(32, samples, anchor)


def test_negative_width_and_duplicate_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="width"):
        entry(-1, [1.0], [1.0])
    twice = entry(32, [1.0], [1.0])
    with pytest.raises(ValidationError, match="two entries"):
        table(entries=(twice, twice))


def test_missing_price_names_site_level_and_next_command() -> None:
    prices = table(entry(32, [1.0], [1.0]))
    with pytest.raises(TableMissing) as caught:
        prices.price("ffn", Level(64, "int8-static"))
    for part in ("ffn", "64@int8-static", "'cpu'", "zipc profile MODEL --target cpu", "128"):
        assert part in str(caught.value)
    with pytest.raises(TableMissing, match="empty"):
        _ = table().anchor_ms_p50


def test_a_removed_site_costs_the_same_under_every_numeric() -> None:
    prices = table(entry(0, [0.5], [1.0]), entry(32, [1.0], [1.0]))
    assert prices.price("ffn", Level(0, "int8-dynamic")) == prices.price("ffn", Level(0))
    assert prices.levels("ffn") == (Level(0), Level(32))
    assert prices.levels("heads") == ()
    assert not prices.has("heads", Level(0))


@pytest.mark.parametrize(
    ("widths", "knots"),
    [(range(1, 17), (1, 8, 15, 16)), ((2, 4, 8), (2, 4, 8)), ((4, 8), (4, 8)), ((8,), (8,))],
)
def test_knots_are_the_least_the_middle_and_the_two_greatest_widths(
    widths: Sequence[int], knots: tuple[int, ...]
) -> None:
    held = table(*(entry(width, [1.0], [1.0]) for width in (0, *widths)))
    assert held.knots("ffn", Level(5)) == knots
    assert held.knots("ffn", Level(0)) == (0,)


def test_with_entries_replaces_and_leaves_the_old_table_alone() -> None:
    old = table(entry(32, [1.0], [1.0]))
    assert old.price("ffn", Level(32)) == 1.0
    new = old.with_entries([entry(32, [3.0], [1.0]), entry(16, [0.5], [1.0])])
    assert old.price("ffn", Level(32)) == 1.0
    assert new.price("ffn", Level(32)) == 3.0
    assert [e.level.width for e in new.entries] == [16, 32]


def test_pooled_keeps_all_samples_and_refuses_another_level() -> None:
    a, b = entry(32, [1.0, 2.0], [1.0, 1.0]), entry(32, [3.0], [1.0])
    assert a.pooled(b).samples_ms == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="cannot pool"):
        a.pooled(entry(64, [1.0], [1.0]))


def test_merge_joins_tables_of_one_device_and_later_entries_win() -> None:
    left = table(entry(32, [1.0], [1.0]), entry(64, [2.0], [1.0]), notes=("left",))
    right = table(entry(64, [3.0], [1.0]), notes=("right",))
    merged = left.merge(right)
    assert merged.price("ffn", Level(32)) == 1.0
    assert merged.price("ffn", Level(64)) == 3.0
    assert merged.notes == ("left", "right")


def test_what_is_measured_in_place_is_no_price_and_goes_with_new_checks() -> None:
    alone, placed = entry(32, [1.0], [1.0]), entry(32, [9.0], [10.0])
    both = table(alone).with_entries([placed], in_place=True).with_correction(CHECKED)
    assert both.price("ffn", Level(32)) == 1.0
    assert [e.ratio for e in both.in_place] == [0.9]
    assert table(alone).merge(both).in_place == both.in_place
    assert both.unplaced() == table(alone, created=both.created)


def test_merge_keeps_a_correction_only_with_the_entries_it_was_fitted_on() -> None:
    fitted = table(entry(32, [1.0], [1.0])).with_correction(CHECKED)
    assert fitted.merge(table()).correction == fitted.correction
    assert fitted.merge(table(entry(64, [2.0], [1.0]))).correction is None


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": {"cpu": "b"}},
        {"workload": Workload(8, 128, 1)},
        {"anchor": "another graph"},
        {"kind": "modelled"},
    ],
)
def test_merge_refuses_another_device_workload_or_anchor(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"differ in {next(iter(change))}"):
        table().merge(table(**change))


@given(
    st.lists(
        st.tuples(st.floats(1e-4, 1e4), st.floats(1e-4, 1e4)),
        min_size=1,
        max_size=20,
    )
)
def test_json_round_trip_is_exact_and_prices_are_positive(pairs: list[tuple[float, float]]) -> None:
    prices = table(entry(32, [s for s, _ in pairs], [a for _, a in pairs]))
    again = LatencyTable.model_validate_json(prices.model_dump_json())
    assert again == prices
    assert again.price("ffn", Level(32)) > 0
    assert all(round(ms, 5) == ms for e in again.entries for ms in e.samples_ms)
