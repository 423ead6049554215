"""One batch in, pooled embeddings or logits out: from an ONNX file, or from a torch module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from zipc.batches import Batch
from zipc.core.errors import UsageError
from zipc.pooling import Pooling, pool

Array = npt.NDArray[Any]
Run = Callable[[Batch], Array]  # -> (b, d)
OUTPUTS = {"logits": "logits", "pooler": "pooler_output"}  # else last_hidden_state
INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


def onnx_run(model: Path | bytes, pooling: Pooling, *, threads: int = 1) -> Run:
    """Load a graph into ONNX Runtime (CPU, default optimisations) as a function of batches.

    Raises:
        UsageError: it cannot be loaded, or has inputs or outputs other than a text encoder's.
    """
    name = "the model" if isinstance(model, bytes) else str(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise UsageError(f"ONNX Runtime cannot load {name}: {_first_line(error)}") from error
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
        try:
            (found,) = session.run([wanted], cast)
        except Exception as error:
            raise UsageError(f"ONNX Runtime cannot run {name}: {_first_line(error)}") from error
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


def _pick(out: Any, wanted: str) -> torch.Tensor:
    found = out[0] if isinstance(out, tuple) else out[wanted]
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"the module gives {type(found).__name__} for {wanted}")
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
