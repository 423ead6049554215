"""Do the same for several things at once, where most of the time is spent waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from zipc.core.errors import ZipcError

Given = TypeVar("Given")
Result = TypeVar("Result")


def beside(function: Callable[[Given], Result], given: Sequence[Given]) -> list[Result | ZipcError]:
    """Call a function with each of `given` in a thread of its own; results in order.

    A `ZipcError` is the result of a call and stops no other; any other exception is raised once all
    have ended. The threads do not keep an interrupted process alive.
    """
    results: dict[int, Result | ZipcError] = {}
    bugs: list[Exception] = []

    def call(number: int) -> None:
        try:
            results[number] = function(given[number])
        except ZipcError as error:
            results[number] = error
        except Exception as bug:
            bugs.append(bug)

    threads = [threading.Thread(target=call, args=(n,), daemon=True) for n in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if bugs:
        raise bugs[0]
    return [results[number] for number in range(len(given))]
