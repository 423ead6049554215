"""What the loop learns from its looks."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from zipc import closed_loop
from zipc.closed_loop import SLACK, ClosedLoop, _Attempt, _bias, _toll
from zipc.core.request import Request
from zipc.core.types import Allocation, Level, PairedTiming, Silent
from zipc.effort import EFFORTS
from zipc.pruner.allocate.search import SearchState


def look(*, speedup: float = 2.0, width: float = 0.005, toll: float = 1.0, noise: float = 0.01):
    """An artifact predicted at 2x that gains `toll` times less under default options."""
    allocation = Allocation({}, 1.0, 0.0)
    return _Attempt(allocation, speedup, width, 0.5, 0.0, math.log(toll), noise)


def test_before_the_first_look_nothing_is_known() -> None:
    assert _bias([]) == _toll([], 2.0) == 1.0


def test_predictions_that_are_too_fast_ask_for_less_time() -> None:
    assert _bias([look(speedup=1.8)]) == pytest.approx(0.9, abs=0.015)
    assert _bias([look(speedup=2.2)]) == pytest.approx(1.1, abs=0.015)


def test_a_noisy_look_counts_for_less() -> None:
    quiet, noisy = look(speedup=1.8), look(speedup=1.8, width=0.2)
    assert _bias([quiet]) < _bias([noisy]) < 1.0
    assert 1.0 < _toll([look(toll=1.2, noise=0.3)], 1.6) < _toll([look(toll=1.2)], 1.6) <= 1.2


def test_gaining_more_under_default_options_gives_nothing_back() -> None:
    assert _toll([look(toll=0.8)], 2.0) == 1.0


def test_what_default_options_cost_grows_with_the_speedup() -> None:
    looks = [look(speedup=2.0, toll=2.0**0.25), look(speedup=4.0, toll=4.0**0.25)]
    for target in (1.5, 3.0):
        needed = target * _toll(looks, target)
        assert needed**0.75 == pytest.approx(target, rel=0.03)
    assert _toll([look(toll=1.9)], 2.0) <= 2.0**1.5


def test_a_small_loss_under_default_options_is_covered_by_the_margin() -> None:
    loop = ClosedLoop.__new__(ClosedLoop)
    loop.attempts = [look(toll=1.01)]
    assert loop.needed(2.0) == 2.0
    loop.attempts = [look(toll=1.2)]
    assert loop.needed(2.0) == pytest.approx(2.0 * _toll(loop.attempts, 2.0) / SLACK)
    assert loop.needed(2.0) > 2.2


def test_a_look_under_default_options_that_disappoints_is_taken_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = iter([1.3, 1.6, 1.2, 1.1, 1.9])
    loop = ClosedLoop.__new__(ClosedLoop)
    loop.device, loop.dense = SimpleNamespace(kind="measured"), b""  # type: ignore[assignment]
    loop.request, loop.progress = Request(model="m"), Silent()

    def timed(*_: Any) -> PairedTiming:
        speedup = next(looks)
        return PairedTiming((), (), speedup, (speedup, speedup))

    monkeypatch.setattr(closed_loop, "by_default", timed)
    for expected in (1.6, 1.2, 1.9):
        found = loop.by_default(b"", enough=1.5)
        assert found is not None
        assert found.speedup == expected


def fresh_loop() -> ClosedLoop:
    """A loop before its first look, without a model."""
    loop = ClosedLoop.__new__(ClosedLoop)
    loop.attempts, loop.state, loop.searched, loop.looks = [], None, 0, []
    loop.effort, loop.accept, loop.aim = EFFORTS["default"], (1.02, 1.042), 1.03
    loop.progress, loop.rng = Silent(), np.random.default_rng(0)
    loop.request = Request(model="m")
    loop.problem = loop.prices = loop.candidates = None  # type: ignore[assignment]
    return loop


@pytest.mark.parametrize(("predicted", "wins"), [(1.51, True), (1.49, False), (1.6, False)])
def test_numerics_alone_are_looked_at_where_the_search_aims_a_little_higher(
    monkeypatch: pytest.MonkeyPatch, *, predicted: float, wins: bool
) -> None:
    """What they are predicted at falls short of the aim but not of the request: they may do."""
    loop = fresh_loop()
    levels = [Level(4), Level(8), Level(4, "int8-static"), Level(8, "int8-static")]
    times = np.array([3.0, 4.0, 1.0, 2.0])
    loop.problem = SimpleNamespace(  # type: ignore[assignment]
        levels=[levels],
        times=[times],
        allocation=lambda c: Allocation({"a": levels[c[0]]}, float(times[c[0]]), 0.0),
    )
    loop.prices = SimpleNamespace(ratio=lambda ms: ms / (2.0 * predicted))  # type: ignore[assignment]
    loop.prepared = SimpleNamespace(body=None, sites={})  # type: ignore[assignment]
    cut = Allocation({"a": levels[2]}, 1.0, 0.0)

    def attempt(allocation: Allocation, loss: float = 0.01, **_: float) -> _Attempt:
        found = replace(look(speedup=1.56), allocation=allocation, loss=loss)
        loop.attempts.append(found)
        return found

    chosen = ([(cut, 0.1)], SearchState([], 0.0, np.zeros(1), trials=1))
    monkeypatch.setattr(closed_loop, "choose", lambda *_, **__: chosen)
    monkeypatch.setattr(loop, "attempt", attempt)
    found = loop.solve(1.5)
    assert found.allocation.levels["a"] == (levels[3] if wins else levels[2])


def test_the_next_finalist_is_built_where_the_best_is_too_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Predictions are off for each in its own way: a search anew would not know which."""
    speedups = {"best": 1.98, "second": 2.06, "third": 2.05}
    finalists = [(Allocation({n: Level(1)}, 1.0, 0.0), 0.1 * i) for i, n in enumerate(speedups)]
    loop = fresh_loop()
    searches: list[float] = []

    def choose(*_: Any, ratio: float, **__: Any) -> Any:
        searches.append(ratio)
        return finalists, SearchState([], 0.0, np.zeros(1), trials=1)

    def attempt(allocation: Allocation, loss: float, **_: float) -> _Attempt:
        found = replace(look(speedup=speedups[next(iter(allocation.levels))]), loss=loss)
        loop.attempts.append(found)
        return found

    monkeypatch.setattr(closed_loop, "choose", choose)
    monkeypatch.setattr(loop, "attempt", attempt)
    assert loop.run(2.0).loss == pytest.approx(0.1)
    assert (len(searches), len(loop.attempts)) == (1, 2)
