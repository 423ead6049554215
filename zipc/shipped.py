"""The two graphs that are shipped, in the dialect of the runtime they are for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from zipc.build import INT8_BOUND, Built, dense_model, edit_of
from zipc.core.request import Request
from zipc.core.types import Target, Workload
from zipc.exporters.onnx_export import check_parity
from zipc.exporters.origin import places
from zipc.exporters.specialise import Edit
from zipc.exporters.tensorrt.emit import emit
from zipc.exporters.tensorrt.half import kept_in_fp32
from zipc.exporters.tensorrt.maxima import maxima
from zipc.exporters.triton import repository
from zipc.prepare import Prepared
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.pruner.graph.sites import sizes_at

HALF_BOUND = 5e-2  # norm of fp16 minus fp32, relative to fp32
ROWS = 4  # of a batch that values are looked at on: all of them are held at once
BATCHES = 8

Feeds = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True)
class Shipped:
    """What is written to OUT; `places` says where a node of the model came from."""

    model: bytes
    reference: bytes
    places: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def reference(prepared: Prepared, *, target: Target, batches: Sequence[Feeds]) -> bytes:
    """The dense model as it is shipped; see `ship`."""
    if target.runtime != "tensorrt":
        return dense_model(prepared)
    held = maxima(prepared.dense, Edit(), _few(batches))
    return emit(prepared.dense, Edit(), maxima=held).to_bytes()


def ship(
    prepared: Prepared,
    built: Built,
    dense: bytes,
    *,
    target: Target,
    workload: Workload,
    batches: Sequence[Feeds],
    placed: bool = False,
) -> Shipped:
    """The graph itself for ONNX Runtime; for TensorRT, the same weights as it takes them.

    `dense` is the `reference`. For TensorRT `batches` of calibration rows tell which values fp16
    cannot hold. `placed` asks for places, which errors of a builder name.

    Raises:
        ExportMismatch: the graph for TensorRT is far from the one the search judged.
    """
    if target.runtime != "tensorrt":
        return Shipped(built.model, dense)
    seen = _few(batches)
    edit = edit_of(built.states, sizes_at(prepared.structure, built.allocation.widths))
    stand_for = {f"{m}.weight": built.states.maps[m].weight.numpy() for m in edit.int8}
    floats = replace(edit, int8={}, tensors={**edit.tensors, **stand_for})
    model = emit(prepared.dense, edit, maxima=maxima(prepared.dense, floats, seen))
    made = model.to_bytes()
    names = [name for _, name in prepared.source.outputs]
    got, want = (
        OnnxRuntimeRunner(m, workload=workload).outputs(seen[0]) for m in (made, built.model)
    )
    check_parity(
        *([found[n] for n in names] for found in (got, want)),
        bound=INT8_BOUND if edit.int8 else HALF_BOUND,
        what="the graph for TensorRT against the one that was searched",
    )
    kept = Counter(k.reason for k in kept_in_fp32(model))
    notes = [f"{count} operators stay in fp32: {reason}" for reason, count in kept.items()]
    found = places(model, prepared.program.exported) if placed else {}
    return Shipped(made, dense, found, (*notes,))


def _few(batches: Sequence[Feeds]) -> list[Feeds]:
    return [{n: v[:ROWS] for n, v in batch.items()} for batch in batches[:BATCHES]]


def layout(
    shipped: Shipped, request: Request, *, source: str, target: Target, plan: bytes | None
) -> dict[str, bytes]:
    """The files of the layout that was asked for, by path; the model bears the name of its source.

    The server runs engines by TensorRT, a `plan`, but not those by TensorRT-RTX.

    Raises:
        UsageError: the server has no name for the type of an input or output.
    """
    if request.layout is None:
        return {}
    name = re.split("[/:]", source.rstrip("/"))[-1]
    return repository(
        name,
        shipped.model,
        workload=request.workload,
        tensorrt=target.runtime == "tensorrt",
        plan=plan,
    )
