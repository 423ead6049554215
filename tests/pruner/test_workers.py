"""Work side by side comes back in order, with its errors, under the caller's gradient mode."""

from __future__ import annotations

import threading

import pytest
import torch

from zipc.pruner import workers
from zipc.pruner.workers import side_by_side


@pytest.fixture(params=[1, 2, 5])
def count(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(workers, "usable_processors", lambda: request.param)
    return int(request.param)


def test_results_come_in_order_whoever_is_first(count: int) -> None:
    met = threading.Barrier(count, timeout=30)

    def late(i: int) -> int:
        if i < count:
            met.wait()  # nobody goes on before all are there: they do run side by side
        return i * i

    assert list(side_by_side(late, range(20))) == [i * i for i in range(20)]


def test_little_is_held_while_the_caller_is_slow(count: int) -> None:
    begun: list[int] = []
    results = side_by_side(lambda i: begun.append(i) or i, range(100))
    assert next(results) == 0
    assert len(begun) <= count + 1
    results.close()


def test_an_error_is_raised_and_the_rest_is_not_begun(count: int) -> None:
    begun: list[int] = []

    def fail(i: int) -> None:
        begun.append(i)
        raise ArithmeticError(i)

    with pytest.raises(ArithmeticError, match="0"):
        list(side_by_side(fail, range(100)))
    assert len(begun) <= 2 * count + 1


@pytest.mark.usefixtures("count")
def test_gradients_are_as_outside() -> None:
    weight = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not any(t.requires_grad for t in side_by_side(lambda i: weight * i, range(3)))
    with torch.inference_mode():
        assert all(t.is_inference() for t in side_by_side(lambda i: weight * i, range(3)))
    assert all(t.requires_grad for t in side_by_side(lambda i: weight * i, range(3)))
