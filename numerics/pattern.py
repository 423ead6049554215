"""n:m sparsity as a property of arrays: at most n of each m consecutive input channels are not 0.

Channels are counted at each kernel position by itself, as sparse tensor cores read them (NVIDIA
TensorRT developer guide, "Structured Sparsity"), not along the flattened matrix of a convolution.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zipc.core.errors import UsageError

# (multiple of the output channels, of the input channels) that a weight needs for its kernel to run
# without padding: fp16 as NVIDIA's ASP and Model Optimizer demand it, INT8 as cuSPARSELt does.
MULTIPLES = {"fp16": (8, 16), "int8": (32, 32)}


def parse_pattern(text: str) -> tuple[int, int]:
    """Kept and group size of "2:4".

    Raises:
        UsageError: it is no pattern.
    """
    kept, _, of = text.partition(":")
    if kept.isdecimal() and of.isdecimal() and 0 < int(kept) < int(of):
        return int(kept), int(of)
    raise UsageError(f"'{text}' is no sparsity pattern: write kept:group, as in 2:4.")


def obstacle(outputs: int, channels: int, *, integer: bool) -> str | None:
    """Why sparse kernels do not take a weight of so many output and input channels; None if so.

    `channels` are those of one group of a grouped convolution.
    """
    rows, columns = MULTIPLES["int8" if integer else "fp16"]
    if channels % columns or not channels:
        return f"{channels} input channels are no multiple of {columns}"
    if outputs % rows or not outputs:
        return f"{outputs} output channels are no multiple of {rows}"
    return None


def conforms(values: np.ndarray[Any, Any], *, axis: int, pattern: str = "2:4") -> bool:
    """Whether an array of weights has the pattern along the `axis` of its input channels."""
    kept, of = parse_pattern(pattern)
    if values.shape[axis] % of:
        return False
    filled = np.moveaxis(values != 0, axis, 0).view(np.uint8)
    count = sum((filled[i::of] for i in range(1, of)), start=filled[::of])
    return bool((count <= kept).all())
