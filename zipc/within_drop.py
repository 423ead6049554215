"""The fastest artifact whose quality stays near that of the dense model: `--max-drop`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from zipc.build import Built
from zipc.closed_loop import ClosedLoop
from zipc.core.errors import TargetUnreachable, UsageError
from zipc.metrics import lower_is_better
from zipc.samples import Samples
from zipc.shipped import Shipped

STEPS = 5  # each halves what lies between a speedup that loses little and one that loses much
LEAST = 1.05  # less than this is not worth an artifact of its own


@dataclass(frozen=True, slots=True)
class Within:
    """A speedup, and what is told of the loss of its artifact on the rows of dev."""

    speedup: float
    told: str


def fastest_within(
    loop: ClosedLoop,
    ship: Callable[[Built], Shipped],
    samples: Samples,
    max_drop: float,
    *,
    runtime: str,
) -> Within:
    """The largest speedup found at which an artifact loses at most `max_drop` on the rows of dev.

    A loss is read from finished graphs at `STEPS` speedups, each halfway, in its logarithm, between
    the largest that kept it and the smallest that did not; the fastest there is bounds them. Rows
    of test are not read: what is lost there is for the report to say.

    Raises:
        TargetUnreachable: none of them keeps it.
        UsageError: there are no rows of dev to read it from.
    """
    rows = samples.sizes["dev"]
    if rows < 2:
        raise UsageError(
            f"--max-drop is read from the dev part of --data, which has {rows} rows with labels. "
            "Give more rows, or a speedup to reach: --speedup 2x."
        )
    low, high = 0.0, -math.log(loop.prices.ratio(loop.fastest().predicted_ms))
    best: Within | None = None
    least = math.inf
    for _ in range(STEPS):
        target = max(math.exp((low + high) / 2), LEAST)
        found = loop.find(target)
        if found.solution.unreachable:
            high = (low + high) / 2
            continue
        loop.progress.stage("quality on dev")
        shipped = ship(found.built)
        dense, compiled = samples.compare(shipped.reference, shipped.model, "dev", runtime=runtime)
        drop = dense.value - compiled.value
        drop = -drop if lower_is_better(samples.metric) else drop
        measured = found.solution.measured or target
        told = (
            f"{samples.metric} on dev ({rows} rows): dense {dense.value:.4g}, {compiled.value:.4g} "
            f"at {measured:.2f}x, {max(drop, 0.0):.2g} lost of {max_drop:g} allowed"
        )
        loop.progress.done(told)
        least = min(least, drop)
        if drop <= max_drop:
            best, low = Within(target, told), math.log(target)
        else:
            high = math.log(target)
        if high - low < math.log(LEAST) / 2:
            break
    if best is None:
        told = f"the least was {least:.2g}" if least < math.inf else "none could be made"
        raise TargetUnreachable(
            f"Nothing of {LEAST:g}x or more was found that loses as little as {max_drop:g} of "
            f"{samples.metric} on dev; {told}. Allow more with --max-drop, or search longer with "
            "--effort extensive.",
            best_speedup=1.0,
        )
    return best
