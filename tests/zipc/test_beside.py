"""Calls in threads of their own: at once, in order, and one that fails stops no other."""

from __future__ import annotations

import threading

import pytest

from zipc.core.beside import beside
from zipc.core.errors import RemoteError


def test_calls_run_at_once_and_results_keep_their_order() -> None:
    together = threading.Barrier(3, timeout=10)

    def call(number: int) -> int:
        together.wait()
        if number == 1:
            raise RemoteError("gone")
        return 10 * number

    first, failed, last = beside(call, [0, 1, 2])
    assert (first, last) == (0, 20)
    assert isinstance(failed, RemoteError)


def test_a_bug_is_raised_once_all_have_ended() -> None:
    ended = []

    def call(number: int) -> None:
        if number == 0:
            raise ZeroDivisionError
        ended.append(number)

    with pytest.raises(ZeroDivisionError):
        beside(call, [0, 1, 2])
    assert sorted(ended) == [1, 2]
