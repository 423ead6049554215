"""How images of bytes become the numbers a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zipc.core.errors import UsageError
from zipc.model_source import SourceModel
from zipc.pooling import read_model_json
from zipc.predict import Array

MEAN, STD = "mean", "std"
CHANNELS = (1, 3, 4)  # a uint8 array (rows, height, width, channels) is images
Scale = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]  # mean and std of 0..1 pixels


def normalised(images: Array, scale: Scale) -> Array:
    """Turn bytes (n, h, w, c) into floats (n, c, h, w)."""
    mean, std = scale
    pixels = (images.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def find_scale(
    source: SourceModel,
    held: Mapping[str, Mapping[str, Array]],
    read: Mapping[str, Mapping[str, Array]],
    files: Mapping[str, Path],
) -> tuple[Scale | None, list[str]]:
    """Return mean and std for images of bytes and where they come from; None where there are none.

    Raises:
        UsageError: bytes that are no images, no mean and std, or such as cannot be meant.
    """
    role, arrays = next(iter(held.items()))
    bytes_of = {name: values for name, values in arrays.items() if values.dtype == np.uint8}
    images = {n: v for n, v in bytes_of.items() if v.ndim == 4 and v.shape[-1] in CHANNELS}
    strange = sorted(set(bytes_of) - set(images) - {"attention_mask", "token_type_ids"})
    if strange:
        raise UsageError(
            f"'{strange[0]}' in {files[role]} holds bytes of the shape "
            f"{bytes_of[strange[0]].shape}; only images (rows, height, width, channels) may be "
            "bytes. Save floats that the model takes as they are, or int64 for ids."
        )
    if not images:
        return None, []
    channels = next(iter(images.values())).shape[-1]
    carried = {r: (a[MEAN], a[STD]) for r, a in read.items() if MEAN in a and STD in a}
    if carried:
        scales = [_checked_scale(*pair, channels, files[r]) for r, pair in carried.items()]
        if any(not np.array_equal(a, b) for s in scales for a, b in zip(s, scales[0], strict=True)):
            raise UsageError(f"The .npz files have different '{MEAN}' or '{STD}'.")
        return scales[0], [_told(scales[0], "of the .npz")]
    config = source.folder / "preprocessor_config.json" if source.folder is not None else None
    if config is None or not config.is_file():
        raise UsageError(
            f"{files[role]} holds images as bytes and neither it nor {source.source} says how to "
            f"normalise them. Add the arrays '{MEAN}' and '{STD}' (of pixels from 0 to 1, one "
            "number a channel; 0 and 1 if the model takes pixels from 0 to 1)."
        )
    document = read_model_json(config)
    plain = not document.get("do_normalize", True)
    mean = [0.0] if plain else document.get("image_mean", [0.5])
    std = [1.0] if plain else document.get("image_std", [0.5])
    scale = _checked_scale(np.asarray(mean), np.asarray(std), channels, config)
    return scale, [_told(scale, config.name)]


def _checked_scale(mean: Array, std: Array, channels: int, path: Path) -> Scale:
    values = []
    for name, given in ((MEAN, mean), (STD, std)):
        flat = np.asarray(given, np.float64).reshape(-1)
        if flat.size not in (1, channels) or not np.isfinite(flat).all() or (flat > 4).any():
            raise UsageError(
                f"'{name}' in {path} must be {channels} numbers for pixels from 0 to 1, not "
                f"{np.round(flat[:8], 4).tolist()}."
            )
        values.append(np.broadcast_to(flat, channels).astype(np.float32))
    if (values[1] <= 0).any():
        raise UsageError(f"'{STD}' in {path} must be more than 0.")
    return values[0], values[1]


def _told(scale: Scale, origin: str) -> str:
    mean, std = (", ".join(f"{v:.3g}" for v in values) for values in scale)
    return f"bytes normalised by mean {mean}, std {std} {origin}"
