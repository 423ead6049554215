"""A repair that brings outputs no nearer to dense is tried more gently, and left out in the end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from zipc import repair
from zipc.core.types import Allocation, Level, Silent

LADDER = 0.5  # here, weights are the loss that they have


def chosen(monkeypatch: pytest.MonkeyPatch, losses: list[float], *, width: int = 3):
    """Which weights are taken where repairs, ever more gentle, have these losses; notes; ridges."""
    left, ridges = iter(losses), []

    def propagate(*_: object, ridge: float, **__: object) -> float:
        ridges.append(ridge)
        return next(left)

    monkeypatch.setattr(repair, "propagate", propagate)
    monkeypatch.setattr(repair, "variant_of", lambda _, states: states)
    candidates = SimpleNamespace(
        levels=SimpleNamespace(states=lambda *_, **__: LADDER),
        confirm=SimpleNamespace(judge=lambda outputs: outputs({})[0]),
        repair=[],
        notes=[],
    )
    prepared = SimpleNamespace(
        executor=SimpleNamespace(run=lambda _, states: ([states], {})),
        sites={"ffn": SimpleNamespace(units=4)},
    )
    allocation = Allocation({"ffn": Level(width)}, 1.0, 0.0)
    best = repair._best(prepared, candidates, allocation, Silent())  # type: ignore[arg-type]
    return best, candidates.notes, ridges


def test_a_repair_that_helps_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, [0.2]) == (0.2, [], [repair.RIDGE])


def test_one_that_hurts_is_tried_more_gently(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, [0.7, 0.4]) == (0.4, [], list(repair.RIDGES))


def test_one_that_never_helps_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    best, notes, _ = chosen(monkeypatch, [0.7, float("nan")])
    assert best == LADDER
    assert "left out" in notes[0]


def test_what_is_whole_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, [], width=4) == (LADDER, [], [])
