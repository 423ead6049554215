"""The shapes an engine is built for, from the workload that is timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import ModelProto

from zipc.core.axes import shape_of, size_of
from zipc.core.types import Workload

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """Sizes of one input: the engine takes those between `least` and `most`, and is tuned for
    `most`."""

    least: Shape
    most: Shape


def profiles(model: ModelProto, workload: Workload) -> dict[str, Profile]:
    """One profile for every input: open axes go from 1 to the size the workload has.

    Raises:
        UsageError: see `shape_of`.
    """
    ones = dict.fromkeys(workload.axes, 1)
    found = {}
    for given in model.graph.input:
        dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
        most = shape_of(given.name, dims, workload)
        least = (
            d if isinstance(d, int) else min(n, size_of(d, ones) or 1)
            for d, n in zip(dims, most, strict=True)
        )
        found[given.name] = Profile(tuple(least), most)
    return found


def profile_texts(found: Mapping[str, Profile]) -> dict[str, str]:
    """The least, best and largest sizes of all inputs, "a:1x1,b:1x1" under "min", "opt" and "max".

    Empty where no axis is open.
    """
    if all(p.least == p.most for p in found.values()):
        return {}
    ends = {"min": "least", "opt": "most", "max": "most"}
    return {
        end: ",".join(f"{n}:{sizes(getattr(p, field))}" for n, p in found.items())
        for end, field in ends.items()
    }


def sizes(shape: Shape) -> str:
    """A shape as trtexec spells it, "8x128"."""
    return "x".join(map(str, shape))
