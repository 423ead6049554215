"""One batch in, outputs out: from an ONNX file, or from a torch module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from zipc.batches import Batch
from zipc.core.errors import UsageError
from zipc.core.types import Workload
from zipc.pooling import Pooling, pool
from zipc.profiler.agent import TITLES
from zipc.profiler.runners.registry import RUNNERS
from zipc.sources.common import CACHED

Array = npt.NDArray[Any]
Run = Callable[[Batch], Array]  # -> (b, d)
OUTPUTS = {"logits": "logits", "pooler": "pooler_output"}  # else last_hidden_state
Outputs = dict[str, Array]  # by name, rows first
Predict = Callable[[Mapping[str, Array]], Outputs]
INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
TYPES: dict[str, Any] = {
    **INTEGERS,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def onnx_run(
    model: Path | bytes, pooling: Pooling, *, threads: int = 1, runtime: str = "onnxruntime"
) -> Run:
    """Load a graph into a runtime (CPU, default optimisations) as a function of batches.

    Raises:
        UsageError: it cannot be loaded, or has inputs or outputs other than a text encoder's.
    """
    session, name = _open(model, threads, runtime)
    types = {value.name: value.type for value in session.get_inputs()}
    unknown = set(types) - {"input_ids", "attention_mask", "token_type_ids"}
    if unknown:
        raise UsageError(f"{name} has inputs zipc does not feed: {', '.join(sorted(unknown))}.")
    wanted = OUTPUTS.get(pooling.mode, "last_hidden_state")
    outputs = [value.name for value in session.get_outputs()]
    if wanted not in outputs:
        raise UsageError(f"{name} has no output '{wanted}', only {', '.join(outputs)}.")

    def run(batch: Batch) -> Array:
        feeds = batch.feeds
        feeds.setdefault("token_type_ids", np.zeros_like(batch.input_ids))
        cast = {key: feeds[key].astype(INTEGERS.get(kind, np.int64)) for key, kind in types.items()}
        (found,) = _run(session, [wanted], cast, name=name, runtime=runtime)
        return pool(np.asarray(found), batch.attention_mask, pooling)

    return run


def torch_run(module: torch.nn.Module, pooling: Pooling) -> Run:
    """Make a function of batches from a module that takes them by keyword, without gradients."""
    wanted = OUTPUTS.get(pooling.mode, "last_hidden_state")
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))

    def run(batch: Batch) -> Array:
        feeds = {key: torch.from_numpy(value).to(device) for key, value in batch.feeds.items()}
        with torch.inference_mode():
            out = module(**feeds)
            found = out if isinstance(out, torch.Tensor) else _pick(out, wanted)
            pooled = pool(found, feeds["attention_mask"], pooling)
        return np.asarray(pooled.float().cpu().numpy())

    return run


def onnx_predict(
    model: Path | bytes,
    outputs: Sequence[str],
    *,
    threads: int = 1,
    runtime: str = "onnxruntime",
) -> Predict:
    """Load a graph into a runtime (CPU, default optimisations) as a function of named arrays.

    Arrays the graph has no input for are left out; a cache that is not given is empty.

    Raises:
        UsageError: it cannot be loaded, lacks an output, or an input is not among the arrays.
    """
    session, name = _open(model, threads, runtime)
    types = {value.name: value.type for value in session.get_inputs()}
    caches = {v.name: v.shape for v in session.get_inputs() if v.name.startswith(CACHED)}
    results = [value.name for value in session.get_outputs()]
    lacking = [output for output in outputs if output not in results]
    if lacking:
        raise UsageError(f"{name} has no output '{lacking[0]}', only {', '.join(results)}.")
    strange = [input for input, kind in types.items() if kind not in TYPES]
    if strange:
        raise UsageError(f"{name} takes {types[strange[0]]} as {strange[0]}: zipc cannot feed it.")

    def predict(feeds: Mapping[str, Array]) -> Outputs:
        missing = sorted(set(types) - set(feeds) - set(caches))
        if missing:
            raise UsageError(f"{name} has inputs the data does not: {', '.join(missing)}.")
        rows = len(next(iter(feeds.values())))
        given = dict(feeds)
        for cache, shape in caches.items():
            given.setdefault(cache, np.empty((rows, *_known(shape[1:]))))
        cast = {k: np.asarray(given[k]).astype(TYPES[t]) for k, t in types.items()}
        found = _run(session, outputs, cast, name=name, runtime=runtime)
        return dict(zip(outputs, found, strict=True))

    return predict


def _known(shape: Sequence[int | str]) -> list[int]:
    """The sizes of an input; 0 for those that are open."""
    return [size if isinstance(size, int) else 0 for size in shape]


def _open(model: Path | bytes, threads: int, runtime: str) -> tuple[Any, str]:
    name = "the model" if isinstance(model, bytes) else str(model)
    source = model if isinstance(model, bytes) else str(model)
    runner = RUNNERS[runtime]
    try:
        session = runner.open(source, runner.options(Workload(threads=threads)))
    except Exception as error:  # errors of runtimes share no base
        title = TITLES[runner.runtime]
        raise UsageError(f"{title} cannot load {name}: {_first_line(error)}") from error
    return session, name


def _run(
    session: Any, outputs: Sequence[str], feeds: Mapping[str, Array], *, name: str, runtime: str
) -> list[Array]:
    try:
        return list(session.run(list(outputs), dict(feeds)))
    except Exception as error:
        title = TITLES[RUNNERS[runtime].runtime]
        raise UsageError(f"{title} cannot run {name}: {_first_line(error)}") from error


def _pick(out: Any, wanted: str) -> torch.Tensor:
    found = out[0] if isinstance(out, tuple) else out[wanted]
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"the module gives {type(found).__name__} for {wanted}")
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
