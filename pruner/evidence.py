"""Evidence: second moments and a sample of the inputs of maps, in one pass over the data."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zipc.core.errors import UsageError
from zipc.pruner.graph.interpret import Executor, Variant
from zipc.pruner.graph.trace import MapCall
from zipc.pruner.maps import input_rows, row_count
from zipc.pruner.products import second_moment
from zipc.pruner.workers import side_by_side

SAMPLE_ROWS = 2048  # rows of each input kept for the calibration of activation ranges
PATCHES = 1024  # of a convolution, taken at random from each batch


@dataclass(slots=True)
class InputStats:
    """What is known about the input of a map over the calibration data, by group of the map."""

    gram: Tensor  # (groups, in, in) fp64, sum x x'
    total: Tensor  # (groups, in) fp64, sum x
    count: int  # rows: tokens, or patches
    sample: Tensor  # (rows, groups x in) fp32
    low: float
    high: float


def data_rows(
    call: MapCall,
    x: Tensor,
    mask: Tensor | None,
    *,
    limit: int | None,
    generator: torch.Generator,
) -> Tensor:
    """Which rows of a map's input count: tokens that are no padding, and a draw of patches."""
    if mask is not None and not call.convolution and x.dim() > 2 and x.shape[:2] == mask.shape:
        return mask.flatten().nonzero().flatten()
    count = row_count(call, x)
    if limit is None or count <= limit:
        return torch.arange(count)
    return torch.randint(count, (limit,), generator=generator)


def collect(
    executor: Executor,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    modules: Sequence[str],
    seed: int = 0,
    on_batch: Callable[[], None] | None = None,
) -> dict[str, InputStats]:
    """Run the dense program once; padding is masked out, shared inputs are counted once.

    Products are fp32, accumulated in fp64. Of convolutions some patches are drawn from each batch.

    Raises:
        UsageError: an activation is NaN or infinite; names the module.
    """
    wanted = set(modules)
    calls = [c for c in executor.program.maps if c.module in wanted]
    sources: dict[str, tuple[object, ...]] = {}  # module -> what it reads, and how, in each call
    for call in calls:
        way = (call.source, call.groups, call.window, call.transposed)
        sources[call.module] = (*sources.get(call.module, ()), way)
    leader: dict[tuple[object, ...], str] = {}  # inputs -> the first module that reads just these
    group = {module: leader.setdefault(reads, module) for module, reads in sources.items()}
    readers = {c.node for c in calls if group[c.module] == c.module}
    stats: dict[str, InputStats] = {}
    samples: dict[str, list[Tensor]] = {}
    per_batch = max(1, SAMPLE_ROWS // max(1, len(batches)))
    runs = Counter(c.module for c in calls if c.node in readers)  # of a module, in each batch
    adding = _InOrder()

    def read(number: int) -> dict[str, Tensor]:
        """One batch: its moments are added, some of its rows returned."""
        feeds = batches[number]
        mask = feeds["attention_mask"].bool() if "attention_mask" in feeds else None
        generator = torch.Generator().manual_seed(seed * len(batches) + number)
        drawn: dict[str, list[Tensor]] = {}
        ran: Counter[str] = Counter()

        def see(call: MapCall, x: Tensor) -> None:
            if call.node not in readers:
                return
            limit = PATCHES if call.convolution else None
            rows = input_rows(call, x, data_rows(call, x, mask, limit=limit, generator=generator))
            if not torch.isfinite(rows).all():
                raise UsageError(
                    f"The input of {call.module} is NaN or infinite on the calibration data. "
                    "Check the model in fp32 on this data first."
                )
            parts = rows.chunk(call.groups, dim=1)
            grams = [second_moment(part) for part in parts]
            total = rows.sum(0, dtype=torch.float64).reshape(call.groups, -1)
            low, high = (float(end) for end in torch.aminmax(rows))
            count, width = rows.shape

            def add() -> None:
                held = stats.setdefault(call.module, _empty(call, width))
                for g, gram in enumerate(grams):
                    held.gram[g] += gram
                held.total += total
                held.count += count
                held.low, held.high = min(held.low, low), max(held.high, high)

            adding.take(call.module, number * runs[call.module] + ran[call.module], add)
            ran[call.module] += 1
            chosen = torch.randperm(len(rows), generator=generator)[:per_batch]
            drawn.setdefault(call.module, []).append(rows[chosen])

        executor.run(feeds, Variant(), on_map=see)
        return {module: torch.cat(rows) for module, rows in drawn.items()}

    with torch.no_grad():
        for drawn in side_by_side(read, range(len(batches))):
            for module, rows in drawn.items():
                samples.setdefault(module, []).append(rows)
            if on_batch is not None:
                on_batch()
    assert adding.idle
    for module, held in stats.items():
        held.sample = torch.cat(samples[module])
    return {module: stats[group[module]] for module in group if group[module] in stats}


class _InOrder:
    """Does what threads hand in, under one name, in the order of its numbers: sums of floats depend
    on it. At once where it may, since the moments of whole batches would not fit in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: Counter[str] = Counter()
        self._waiting: dict[str, dict[int, Callable[[], None]]] = {}

    def take(self, name: str, number: int, action: Callable[[], None]) -> None:
        """Do an action, and those that waited for it; or keep it until those before it are done."""
        with self._lock:
            waiting = self._waiting.setdefault(name, {})
            waiting[number] = action
            while (ready := waiting.pop(self._next[name], None)) is not None:
                ready()
                self._next[name] += 1

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""
        return not any(self._waiting.values())


def _empty(call: MapCall, columns: int) -> InputStats:
    width = columns // call.groups
    return InputStats(
        torch.zeros(call.groups, width, width, dtype=torch.float64),
        torch.zeros(call.groups, width, dtype=torch.float64),
        0,
        torch.zeros(0, columns),
        0.0,
        0.0,
    )
