"""Prices of single sites, and what they mean for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zipc import whole_models
from zipc.core.types import Level, Silent, Workload
from zipc.latency_tables.correction import Correction
from zipc.latency_tables.surplus import Whole
from zipc.latency_tables.table import Entry, LatencyTable
from zipc.prices import LEAST_RATIO, UNEXPLAINED, Prices, SitePrices, added_up

UNITS, CALLS = 8, 3
WHOLE_MS = 30.0
LEVELS = [Level(0), *(Level(w, n) for n in ("fp32", "int8-static") for w in (2, 4, 8))]
KIND = "heads-8"
BOARD = {"host": "board"}


def alone_ms(level: Level) -> float:
    """Weights are read from the cache: less than the truth."""
    return 0.7 * in_place_ms(level)


def in_place_ms(level: Level) -> float:
    return 0.2 if level.removed else (0.4 if level.numeric == "fp32" else 0.1) * level.width


def table() -> LatencyTable:
    """One kind of site, three of them in a model."""

    def entry(level: Level) -> Entry:
        samples = (alone_ms(level),) * 3
        return Entry(signature=KIND, level=level, samples_ms=samples, anchor_ms=(1.0,) * 3)

    return LatencyTable(
        target="cpu",
        runtime="onnxruntime",
        workload=Workload(1, 16, 1),
        fingerprint={"cpu": "one"},
    ).with_entries(map(entry, LEVELS))


def prices(held: LatencyTable, *, whole_ms: float = WHOLE_MS, cold: bool = False) -> Prices:
    names = [f"layer.{i}" for i in range(CALLS)]
    calls = dict.fromkeys(names, 1)
    sites = SitePrices(held, dict.fromkeys(names, KIND), dict.fromkeys(names, Level(UNITS)), "fp32")
    add = added_up(
        *(sites, calls, dict.fromkeys(names, LEVELS), {}),
        whole_ms=whole_ms,
        together=None,
        measured=True,
        cold=cold,
    )
    return Prices(held, Path("table"), sites, calls, whole_ms, whole_ms, add, 1.0, False, None)


def told_by(made: Prices, wholes: Sequence[Whole], *, unexplained: float) -> Prices:
    return replace(made, surplus=made.evidence().surplus(wholes, unexplained=unexplained))


def total(made: Prices, level: Level) -> float:
    return made.sum_ms(dict.fromkeys(made.calls, level))


@pytest.mark.parametrize("level", LEVELS)
def test_a_sum_of_prices_is_what_the_whole_model_takes(level: Level) -> None:
    made = prices(table())
    truth = {lv: WHOLE_MS - CALLS * (in_place_ms(Level(UNITS)) - in_place_ms(lv)) for lv in LEVELS}
    wholes = [made.whole(dict.fromkeys(made.calls, lv), ms / WHOLE_MS) for lv, ms in truth.items()]
    told = told_by(made, wholes, unexplained=0.005)
    assert total(told, level) == pytest.approx(truth[level], rel=0.02)


def test_unless_whole_models_tell_more_a_level_saves_what_it_saves_alone() -> None:
    made = prices(table())
    saved = WHOLE_MS - total(made, Level(2))
    assert saved == pytest.approx(CALLS * (alone_ms(Level(UNITS)) - alone_ms(Level(2))))


def test_cold_parts_that_take_more_than_the_whole_take_so_much_more_each() -> None:
    """A part of a decode step waits anew for its first weights; the whole reads on."""
    more = 0.25  # of a call; a removed site takes but 0.1 alone
    whole_ms = CALLS * (alone_ms(Level(UNITS)) - more)
    made = prices(table(), whole_ms=whole_ms, cold=True)
    assert total(made, Level(UNITS)) == pytest.approx(whole_ms)
    assert total(made, Level(4)) == pytest.approx(CALLS * (alone_ms(Level(4)) - more))
    assert 0 < total(made, Level(0)) < 0.01 * whole_ms
    assert total(made, Level(2, "int8-static")) < total(made, Level(4, "int8-static"))


def test_cold_parts_that_take_less_than_the_whole_leave_it_the_rest() -> None:
    made = prices(table(), cold=True)
    hot = prices(table())
    assert [total(made, lv) for lv in LEVELS] == [total(hot, lv) for lv in LEVELS]


@dataclass
class Machine:
    """What whole models take in truth, and models that were measured there."""

    truth: Callable[[Mapping[str, Level]], float]
    numerics: Sequence[Sequence[str]]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def drawn(self, number: int) -> whole_models.WholePoint:
        known = self.numerics[number % len(self.numerics)]
        there = [lv for lv in LEVELS if lv.removed or lv.numeric in known]
        levels = {f"layer.{i}": there[int(self.rng.integers(len(there)))] for i in range(CALLS)}
        levels["layer.0"] = next(lv for lv in there if lv.width)
        return whole_models.WholePoint(levels, [self.truth(levels)], [1.0], [1.0])

    def check(self, made: Prices, *, cold: bool = False, rel: float) -> None:
        """Models of whom some are known predict others."""
        fitted = whole_models.fit_points(made, [self.drawn(i) for i in range(18)], cold=cold)
        assert fitted.median_error < rel
        corrected = made.corrected(fitted)
        for number in range(20):
            point = self.drawn(number)
            predicted = corrected.ratio(corrected.sum_ms(point.levels))
            assert predicted == pytest.approx(point.measured, rel=rel)


def test_what_cold_calls_take_apart_is_told_by_models_that_lack_some_of_them() -> None:
    """Dense parts take 10 % too much, alone; only in part because each is a graph of its own."""
    kept, apart = 0.94, 0.06  # of what a call takes alone; ms
    whole_ms = CALLS * (kept * alone_ms(Level(UNITS)) - apart)

    def truth(levels: Mapping[str, Level]) -> float:
        there = [kept * alone_ms(lv) - apart for lv in levels.values() if not lv.removed]
        return sum(there) / whole_ms

    made = prices(table(), whole_ms=whole_ms, cold=True)
    Machine(truth, [["fp32"]]).check(made, cold=True, rel=0.03)


def test_prices_of_a_numeric_are_scaled_by_what_models_that_have_it_take() -> None:
    whole_ms = 1.1 * CALLS * alone_ms(Level(UNITS))
    made = prices(table(), whole_ms=whole_ms)

    def truth(levels: Mapping[str, Level]) -> float:
        integers = [n for n, lv in levels.items() if lv.numeric == "int8-static"]
        return (made.sum_ms(levels) - 0.1 * sum(made.ms(n, levels[n]) for n in integers)) / whole_ms

    Machine(truth, [["fp32"], ["int8-static"], ["fp32", "int8-static"]]).check(made, rel=0.02)


def test_whole_models_tell_what_widths_in_between_take() -> None:
    """In the whole, half of the units take nearly as much as all of them."""
    whole_ms = 1.1 * CALLS * alone_ms(Level(UNITS))
    made = prices(table(), whole_ms=whole_ms)

    def truth(levels: Mapping[str, Level]) -> float:
        more = 0.15 * alone_ms(Level(4)) * sum(lv == Level(4) for lv in levels.values())
        return (made.sum_ms(levels) + more) / whole_ms

    Machine(truth, [["fp32"]]).check(made, rel=0.02)


def test_widths_that_no_model_had_take_more_as_others_do() -> None:
    """Else a width that is not known looks cheap, and is chosen."""
    made = prices(table())
    wholes = []
    for level in (Level(2, "int8-static"), Level(4, "int8-static")):
        levels = dict.fromkeys(made.calls, level)
        more = 0.2 * sum(made.ms(name, level) for name in levels)
        wholes.append(made.whole(levels, (made.sum_ms(levels) + more) / WHOLE_MS))
    told, widest = told_by(made, wholes, unexplained=0.001), Level(8, "int8-static")
    assert 1.1 < told.ms("layer.0", widest) / made.ms("layer.0", widest) < 1.25


def test_like_parts_of_other_sizes_take_more_alike() -> None:
    """Of the second size no whole model tells much: there is one such part."""
    held, whole_ms = table(), 4.2 * alone_ms(Level(UNITS))
    other = [
        e.model_copy(update={"signature": "heads-16", "level": replace(e.level)})
        for e in held.entries
    ]
    names = ["layer.0", "layer.1", "layer.2", "last"]
    signatures = dict.fromkeys(names, KIND) | {"last": "heads-16"}
    sites = SitePrices(held.with_entries(other), signatures, dict.fromkeys(names, Level(8)), "fp32")
    calls = dict.fromkeys(names, 1)
    add = added_up(
        *(sites, calls, dict.fromkeys(names, LEVELS), {}),
        whole_ms=whole_ms,
        together=None,
        measured=True,
    )
    made = Prices(
        *(sites.table, Path("table"), sites, calls, whole_ms, whole_ms, add, 1.0, False, None)
    )
    wholes = []
    for level in (Level(2, "int8-static"), Level(4, "int8-static"), Level(8, "int8-static")):
        levels = dict.fromkeys(names[:3], level)
        more = 0.2 * sum(made.ms(name, level) for name in levels)
        ratio = (made.sum_ms(levels | {"last": Level(8)}) + more) / whole_ms
        wholes.append(made.whole(levels, ratio, 0.001))
    told = told_by(made, wholes, unexplained=0.001)
    widest = Level(8, "int8-static")
    assert told.ms("layer.0", widest) == pytest.approx(1.2 * made.ms("layer.0", widest), rel=0.05)
    assert made.ms("last", widest) == made.ms("layer.0", widest)
    assert told.ms("last", widest) == pytest.approx(1.2 * made.ms("last", widest), rel=0.08)


def point(levels: Mapping[str, Level], ratio: float) -> whole_models.WholePoint:
    return whole_models.WholePoint(levels, [ratio], [1.0], [1.0])


def test_levels_that_later_checks_are_drawn_at_go_by_what_the_first_ones_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, seen = prices(table()), []

    def levels(_: object, __: object, known: Prices, ___: int, ____: object) -> dict[str, Level]:
        seen.append(known.ms("layer.0", Level(8)))
        return {"layer.0": Level(8), "layer.1": Level(2), "layer.2": Level(0)}

    def measured(
        _: object, __: object, ___: object, chosen: Sequence[Mapping[str, Level]], **____: object
    ) -> list[whole_models.WholePoint]:
        times = [
            1.1 * held.sum_ms(lv) / WHOLE_MS * (1 + 0.1 * (n % 2)) for n, lv in enumerate(chosen)
        ]
        return [point(lv, ms) for lv, ms in zip(chosen, times, strict=True)]

    monkeypatch.setattr(whole_models, "measure_points", measured)
    monkeypatch.setattr(whole_models, "spread_levels", levels)
    unused: Any = None
    fitted, _ = whole_models.fit_correction(
        *(unused, unused, held, unused, unused), Silent(), cold=False
    )
    assert fitted.n == 144
    assert len(set(seen[:6])) == 1
    assert seen[0] == held.ms("layer.0", Level(8)) != seen[6]


def test_the_more_is_left_unexplained_the_less_models_tell() -> None:
    made = prices(table())
    levels = dict.fromkeys(made.calls, Level(4))
    whole = made.whole(levels, 1.2 * made.sum_ms(levels) / WHOLE_MS)
    told = [told_by(made, [whole], unexplained=share).sum_ms(levels) for share in (0.01, 0.1, 1.0)]
    assert 1.2 * made.sum_ms(levels) > told[0] > told[1] > told[2] > made.sum_ms(levels)


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [((0.1, 0.095, 0.092), 0), ((0.1, 0.08, 0.05), 2), ((0.1, 0.08, 0.079), 1)],
)
def test_more_is_left_unexplained_where_that_predicts_left_out_models_clearly_better(
    errors: Sequence[float], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        share: Correction(points=((0.5, 0.5),), errors=(error, error))
        for share, error in zip(UNEXPLAINED, errors, strict=True)
    }
    monkeypatch.setattr(whole_models, "_fitted", lambda _, __, ___, share, **____: made[share])
    unused: Any = SimpleNamespace(evidence=lambda: None)
    assert whole_models.fit_points(unused, [], cold=False) is made[UNEXPLAINED[chosen]]


def test_no_level_takes_less_than_nothing() -> None:
    made = prices(table())
    for name in made.calls:
        assert min(made.ms(name, level) for level in LEVELS) > 0


def test_no_sum_of_prices_promises_a_model_that_takes_nothing() -> None:
    made = prices(table())
    assert made.ratio(-1.0) == made.ratio(0.0) > 0


def measured_points(
    held: Prices, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[whole_models.WholePoint], list[bytes]]:
    """Four whole models of one site, four times as fast as the dense one, and what was loaded."""
    levels = {name: Level(0) for name in held.calls} | {"layer.0": Level(2)}
    loaded = list[bytes]()

    def load(model: bytes, **_: object) -> SimpleNamespace:
        loaded.append(model)
        return SimpleNamespace(run=lambda: {b"dense": 4.0, b"small": 1.0}[model])

    monkeypatch.setattr(whole_models, "whole_model", lambda *_: b"small")
    unused: Any = None
    timer: Any = SimpleNamespace(load=load)
    points = whole_models.measure_points(
        *(unused, held.table, [b"dense"], [levels] * 4),
        open_timer=lambda: timer,
        rounds=2,
        progress=Silent(),
    )
    return points, loaded


@pytest.mark.parametrize(("place", "loads"), [({}, 2), (BOARD, 1)])
def test_whole_models_are_timed_beside_dense_ones_loaded_anew_but_on_boards(
    place: dict[str, str], loads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = prices(table())
    held.table = held.table.model_copy(update={"fingerprint": place})
    assert measured_points(held, monkeypatch)[1].count(b"dense") == loads


@pytest.mark.parametrize(
    ("off", "cold", "place", "enough"),
    [
        (0.0, False, BOARD, 6),
        (0.0, False, {}, 36),
        (0.0, True, {}, 18),
        (0.08, False, BOARD, 18),
        (0.08, False, {}, 144),
        (0.03, False, BOARD, 6),
    ],
)
def test_prices_are_checked_on_more_models_where_one_is_far_off_or_parts_are_cold(
    off: float, cold: bool, place: dict[str, str], enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(
        _: object, __: object, ___: object, chosen: Sequence[object], **____: object
    ) -> list[whole_models.WholePoint]:
        return [point(lv, ratio(lv) * (1 + off * (n == 2))) for n, lv in enumerate(chosen)]

    def ratio(levels: Mapping[str, Level]) -> float:
        return held.sum_ms(levels) / held.whole_ms

    def levels(_: object, __: object, ___: object, number: int, ____: object) -> dict[str, Level]:
        return {n: LEVELS[(number + at) % len(LEVELS)] for at, n in enumerate(held.calls)}

    held = prices(table())
    held.table = held.table.model_copy(update={"fingerprint": place})
    monkeypatch.setattr(whole_models, "measure_points", measured)
    monkeypatch.setattr(whole_models, "spread_levels", levels)
    unused: Any = None
    fitted, points = whole_models.fit_correction(
        *(unused, unused, held, unused, unused), Silent(), cold=cold
    )
    assert fitted.n == len(points) == enough


@pytest.mark.parametrize(("cold", "enough"), [(False, 6), (True, 18)])
def test_checks_that_do_not_agree_end_in_time_but_where_parts_are_cold(
    cold: bool, enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(
        _: object, __: object, ___: object, chosen: Sequence[Mapping[str, Level]], **____: object
    ) -> list[whole_models.WholePoint]:
        return [point(lv, 0.5 + 0.3 * (n % 2)) for n, lv in enumerate(chosen)]

    held = prices(table())
    monkeypatch.setattr(whole_models, "measure_points", measured)
    monkeypatch.setattr(whole_models, "spread_levels", lambda *_: {"layer.0": Level(2)})
    monkeypatch.setattr(whole_models, "CORRECTION_SECONDS", -1.0)
    unused: Any = None
    fitted, _ = whole_models.fit_correction(
        *(unused, unused, held, unused, unused), Silent(), cold=cold
    )
    assert fitted.n == enough
    assert fitted.worst_error > whole_models.ALL_AGREED


def test_sums_that_overlapping_parts_make_negative_are_read_as_the_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a RegNet what units save in each part they are in can add up to more than the whole."""
    held = prices(table())
    held.add = replace(held.add, fixed_ms=-2 * WHOLE_MS)
    points, _ = measured_points(held, monkeypatch)
    assert [p.over_floats for p in points] == [0.25] * 4
    fitted = whole_models.fit_points(held, points, cold=False)
    assert fitted.points == ((pytest.approx(0.25, rel=0.02), 0.25),) * 4
    unfit = whole_models.fit_points(held, [replace(points[0], ms=[1e-3])], cold=False)
    assert unfit.points[0][0] == LEAST_RATIO
