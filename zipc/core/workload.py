"""The workload as JSON: only what applies to the model is written, nothing made up on reading."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from zipc.core.errors import UsageError
from zipc.core.types import Workload


def workload_document(workload: Workload) -> dict[str, Any]:
    """Sizes and threads; a field that does not apply is left out."""
    fields = dataclasses.asdict(workload)
    fields["input_shapes"] = {n: list(shape) for n, shape in workload.input_shapes.items()}
    return {name: value for name, value in fields.items() if value not in (None, {})}


def read_workload(document: Any) -> Workload:
    """The workload of a document; without a sequence length it has none.

    Raises:
        ValueError: a field is missing, unknown, or not a positive whole number.
    """
    if isinstance(document, Workload):
        return document
    if not isinstance(document, Mapping):
        raise ValueError("it is not an object")
    known = {field.name for field in dataclasses.fields(Workload)}
    unknown = sorted(set(document) - known)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]}")
    shapes = document.get("input_shapes") or {}
    if not isinstance(shapes, Mapping):
        raise ValueError("input_shapes is not an object")
    return Workload(
        batch_size=_size(document, "batch_size"),
        sequence_length=_optional(document, "sequence_length"),
        threads=_size(document, "threads"),
        input_shapes={str(n): _shape(n, shape) for n, shape in shapes.items()},
        past_length=_optional(document, "past_length"),
    )


def resized(
    workload: Workload,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    threads: int | None = None,
) -> Workload:
    """The workload with some sizes changed; None keeps one.

    Raises:
        UsageError: a length is given for inputs that have no sequence axis.
    """
    if sequence_length is not None and workload.sequence_length is None:
        raise UsageError(f"--sequence-length: nothing in this workload is a sequence ({workload}).")
    batch = batch_size or workload.batch_size
    shapes = {
        name: (batch, *shape[1:]) if shape[:1] == (workload.batch_size,) else shape
        for name, shape in workload.input_shapes.items()
    }
    return dataclasses.replace(
        workload,
        batch_size=batch,
        sequence_length=sequence_length or workload.sequence_length,
        threads=threads or workload.threads,
        input_shapes=shapes,
    )


def parse_workloads(text: str, what: str = "--workloads") -> list[tuple[int, int | None]]:
    """Read "1x128,8x128" as pairs of batch and length, "1,8" as batches.

    Raises:
        UsageError: it is something else; `what` names it.
    """
    found = [re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", part.strip()) for part in text.split(",")]
    pairs = [(int(m[1]), int(m[2]) if m[2] else None) for m in found if m]
    if len(pairs) < len(found):
        raise UsageError(
            f"{what} '{text}' is not batch x length. Write 8x128, or 1x128,8x128 for several."
        )
    return list(dict.fromkeys(pairs))


WorkloadField = Annotated[
    Workload, BeforeValidator(read_workload), PlainSerializer(workload_document)
]


def _optional(document: Mapping[str, Any], name: str) -> int | None:
    return None if document.get(name) is None else _size(document, name)


def _size(document: Mapping[str, Any], name: str) -> int:
    value = document.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}, not a whole number above 0")
    return value


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list | tuple) or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(f"the shape of {name} is {shape!r}, not whole numbers above 0")
    return tuple(shape)
