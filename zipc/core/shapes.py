"""`--input-shapes` as a string and as values."""

from __future__ import annotations

import re

from zipc.core.errors import UsageError
from zipc.core.types import InputSpec

DTYPES = ("float32", "int64", "int32", "bool", "uint8")


def parse_input_shapes(text: str) -> tuple[InputSpec, ...]:
    """Read "x:1x3x224x224" or "x:1x3x32x32,ids:1x128:int64"; the first axis is the batch.

    Raises:
        UsageError: it is not of that form, or names an input twice.
    """
    specs = []
    for part in text.split(","):
        name, _, rest = part.strip().partition(":")
        sizes, _, dtype = rest.partition(":")
        if not name.isidentifier() or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
            raise UsageError(
                f"--input-shapes: cannot read {part.strip()!r}. Write name:sizes, e.g. "
                "x:1x3x224x224, with the batch first; integers as ids:1x128:int64."
            )
        if dtype and dtype not in DTYPES:
            raise UsageError(
                f"--input-shapes: {name} cannot be {dtype!r}; types are {', '.join(DTYPES)}."
            )
        shape = tuple(int(size) for size in sizes.split("x"))
        specs.append(InputSpec(name, dtype or "float32", shape))
    names = [spec.name for spec in specs]
    double = [name for name in names if names.count(name) > 1]
    if double:
        raise UsageError(f"--input-shapes gives {double[0]} twice.")
    return tuple(specs)
