"""Evidence: second moments and a sample of the inputs of linear maps, in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zipc.core.errors import UsageError
from zipc.pruner.graph.interpret import Executor, Variant
from zipc.pruner.graph.trace import LinearCall
from zipc.pruner.products import second_moment

SAMPLE_ROWS = 2048  # rows of each input kept for the calibration of activation ranges


@dataclass(slots=True)
class InputStats:
    """What is known about the input of a linear map over the calibration data."""

    gram: Tensor  # (in, in) fp64, sum x x'
    total: Tensor  # (in,) fp64, sum x
    count: int  # tokens
    sample: Tensor  # (rows, in) fp32
    low: float
    high: float


def collect(
    executor: Executor,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    modules: Sequence[str],
    seed: int = 0,
    on_batch: Callable[[], None] | None = None,
) -> dict[str, InputStats]:
    """Run the dense program once; padding is masked out, shared inputs are counted once.

    Products are fp32, accumulated in fp64.

    Raises:
        UsageError: an activation is NaN or infinite; names the module.
    """
    wanted = set(modules)
    calls = [c for c in executor.program.linears if c.module in wanted]
    sources: dict[str, tuple[str, ...]] = {}  # module -> the values it reads, one per call
    for call in calls:
        sources[call.module] = (*sources.get(call.module, ()), call.source)
    leader: dict[tuple[str, ...], str] = {}  # values -> the first module that reads just these
    group = {module: leader.setdefault(read, module) for module, read in sources.items()}
    readers = {c.node for c in calls if group[c.module] == c.module}
    stats: dict[str, InputStats] = {}
    generator = torch.Generator().manual_seed(seed)
    per_batch = max(1, SAMPLE_ROWS // max(1, len(batches)))
    mask: Tensor | None = None

    def see(call: LinearCall, x: Tensor) -> None:
        if call.node not in readers:
            return
        tokens = mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape
        rows = (x[mask] if tokens else x).flatten(0, -2)
        if not torch.isfinite(rows).all():
            raise UsageError(
                f"The input of {call.module} is NaN or infinite on the calibration data. Check "
                "the model in fp32 on this data first."
            )
        held = stats.get(call.module)
        if held is None:
            width = rows.shape[1]
            held = stats[call.module] = InputStats(
                torch.zeros(width, width, dtype=torch.float64),
                torch.zeros(width, dtype=torch.float64),
                0,
                rows.new_zeros(0, width),
                0.0,
                0.0,
            )
        held.gram += second_moment(rows)
        held.total += rows.sum(0, dtype=torch.float64)
        held.count += len(rows)
        low, high = torch.aminmax(rows)
        held.low, held.high = min(held.low, float(low)), max(held.high, float(high))
        chosen = torch.randperm(len(rows), generator=generator)[:per_batch]
        held.sample = torch.cat([held.sample, rows[chosen]])

    with torch.inference_mode():
        for feeds in batches:
            mask = feeds["attention_mask"].bool() if "attention_mask" in feeds else None
            executor.run(feeds, Variant(), on_linear=see)
            if on_batch is not None:
                on_batch()
    for held in stats.values():  # leave inference mode: these are ordinary tensors from here on
        held.gram, held.total = held.gram.clone(), held.total.clone()
        held.sample = held.sample.clone()
    return {module: stats[group[module]] for module in group if group[module] in stats}
