"""From hidden states to one vector a text, the way the model folder says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from zipc.core.errors import UsageError

Mode = Literal["mean", "cls", "max", "pooler", "logits"]
Tensor = TypeVar("Tensor", torch.Tensor, npt.NDArray[Any])
Array = npt.NDArray[Any]
MODES: dict[str, Mode] = {
    "mean": "mean",
    "mean_tokens": "mean",
    "cls": "cls",
    "cls_token": "cls",
    "max": "max",
    "max_tokens": "max",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the outputs of a model become what is compared."""

    mode: Mode
    normalize: bool = False
    source: str = ""  # where this comes from, for the user to read


def read_pooling(model_dir: Path, *, has_logits: bool = False) -> Pooling:
    """Read the pooling of a sentence-transformers folder; a model with logits needs none.

    A folder without `modules.json` is pooled by the mean of its tokens, and `source` says so.

    Raises:
        UsageError: the folder asks for a pooling that zipc does not know, or a file is corrupt.
    """
    if has_logits:
        return Pooling("logits", source="the model gives logits")
    modules_file = model_dir / "modules.json"
    if not modules_file.exists():
        return Pooling("mean", source="default: the model folder does not say")
    mode: Mode | None = None
    normalize = False
    extra = []
    for module in read_model_json(modules_file):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            mode = _mode(model_dir / module["path"] / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            extra.append(kind)
    source = "modules.json" if mode else "default: modules.json names no pooling"
    if extra:
        source += f"; without its {', '.join(extra)} module"
    return Pooling(mode or "mean", normalize, source)


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pool hidden states (b, s, d) under a mask (b, s) of 0 and 1 to (b, d).

    For the modes `pooler` and `logits`, `hidden` is what is wanted already, (b, d).
    """
    if isinstance(hidden, torch.Tensor):
        return _pool_torch(hidden, mask, pooling)
    return _pool_numpy(hidden, mask, pooling)


def read_model_json(path: Path) -> Any:
    """Read a JSON file of a model folder.

    Raises:
        UsageError: it is missing or corrupt.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The model file {path} cannot be read ({error}). Fetch the model again."
        ) from error


def _pool_torch(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    found = hidden
    if pooling.mode == "mean":
        weights = mask.to(hidden.dtype)
        total = torch.bmm(weights[:, None, :], hidden)[:, 0]
        found = total / weights.sum(1, keepdim=True).clamp_min(1e-9)
    elif pooling.mode == "cls":
        found = hidden[:, 0]
    elif pooling.mode == "max":
        found = hidden.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)
    if pooling.normalize:
        found = torch.nn.functional.normalize(found, dim=-1)
    return found


def _pool_numpy(hidden: Array, mask: Array, pooling: Pooling) -> Array:
    found = hidden
    if pooling.mode == "mean":
        weights = mask.astype(hidden.dtype)
        total = np.matmul(weights[:, None, :], hidden)[:, 0]
        found = total / np.maximum(weights.sum(1, keepdims=True), 1e-9)
    elif pooling.mode == "cls":
        found = hidden[:, 0]
    elif pooling.mode == "max":
        found = np.where(mask[..., None] == 0, -np.inf, hidden).max(1).astype(hidden.dtype)
    if pooling.normalize:
        found = found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)
    return np.asarray(found)


def _mode(path: Path) -> Mode:
    config = read_model_json(path)
    named = config.get("pooling_mode")
    asked = [named] if isinstance(named, str) else []
    asked = asked or [
        key.removeprefix("pooling_mode_")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if len(asked) != 1 or asked[0] not in MODES:
        raise UsageError(
            f"{path} asks for the pooling '{' + '.join(asked) or 'none'}'; zipc knows mean, cls "
            "and max. Read quality with --eval file.py:function on a model without this module."
        )
    return MODES[asked[0]]
