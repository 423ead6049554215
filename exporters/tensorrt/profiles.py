"""The shapes an engine is built for, from the workload that is timed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from onnx import ModelProto

from zipc.core.errors import UsageError
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
        UsageError: the workload does not say how large an axis is.
    """
    found = {}
    for given in model.graph.input:
        dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
        most = workload.input_shapes.get(given.name)
        if most is None:
            most = tuple(_size(given.name, dim, workload.axes) for dim in dims)
        elif len(most) != len(dims) or any(
            isinstance(d, int) and d != n for d, n in zip(dims, most, strict=True)
        ):
            raise UsageError(
                f"The workload gives input {given.name!r} the shape {list(most)}, but the graph "
                f"takes {dims}. Compile the model for that shape with --input-shapes."
            )
        ones = dict.fromkeys(workload.axes, 1)
        least = (
            d if isinstance(d, int) else min(n, sum(ones.get(a, 1) for a in _terms(d)))
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


def _size(name: str, dim: int | str, axes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    try:
        return sum(int(a) if a.isdigit() else axes[a] for a in _terms(dim))
    except KeyError as error:
        raise UsageError(
            f"Axis {dim} of input {name!r} is open, and the workload does not say how large it is. "
            "Give --input-shapes."
        ) from error


def _terms(dim: str) -> list[str]:
    """The summands of a size such as "past + sequence"."""
    return re.findall(r"\w+", dim)
