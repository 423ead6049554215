"""Batches worked on side by side: a thread for each processor, each with torch on one thread.

Threads that torch spreads one product over spin while they wait, which on a busy machine is slower
than one thread. Threads with a batch each wait for nothing and lose nothing there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from zipc.core.processors import usable_processors

MOST = 8  # each worker holds the activations of a batch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(
    function: Callable[[T], R], items: Iterable[T], *, most: int = MOST
) -> Iterator[R]:
    """`function` of every item, in order; few results exist at a time. Gradients as outside."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def call(item: T) -> R:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return function(item)

    count = min(usable_processors(), most)
    if count == 1:
        yield from map(call, items)
        return
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
