"""What the operators of standard ONNX, opset 18 and later, mean in torch.

Each takes the attributes of its node and its inputs, None where one is left out; inputs that say
how large or where something is (`LISTS`) come as lists of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from zipc.core.errors import ExportMismatch

Operator = Callable[..., Any]
Ints = Sequence[int]

LISTS: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "ConstantOfShape": (0,),
    "Pad": (1, 3),
    "TopK": (1,),
    "Resize": (3,),
    "CumSum": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "ReduceMax": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
}
ON_HOST: Mapping[str, tuple[int, ...]] = {  # inputs that are read as numbers of Python's
    "Pad": (2,),
    "Range": (0, 1, 2),
    "Resize": (2,),
    "Trilu": (1,),
}
OUTPUTS: Mapping[str, float] = {"Attention": 3, "Split": float("inf"), "TopK": 2}  # else one
SELU = 1.67326319217681884765625, 1.05070102214813232421875  # alpha and gamma, by default
SIZED_BY_VALUES = frozenset({"NonZero", "Range"})
DTYPES: Mapping[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT16: torch.int16,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


# Attributes that change nothing of what zipc runs, or repeat what an input says.
_NO_MATTER = {
    *("cubic_coeff_a", "extrapolation_value", "kernel_shape", "momentum", "saturate", "sorted"),
    *("stash_type", "storage_order", "keep_aspect_ratio_policy", "training_mode"),
}


class Attributes(Mapping[str, Any]):
    """The attributes of a node by name, text as text. It knows which of them nobody asked for."""

    def __init__(self, node: onnx.NodeProto) -> None:
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._found = {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}
        self._asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._asked.add(name)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def passed_over(self) -> list[str]:
        """Those that say something and were never read."""
        unread = set(self._found) - self._asked - _NO_MATTER
        return sorted(name for name in unread if self._found[name])


def _plain(function: Callable[..., Tensor]) -> Operator:
    """An operator without attributes."""
    return lambda _, *inputs: function(*inputs)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of any number of inputs."""
    return lambda _, *inputs: reduce(function, inputs)


def _divide(_: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _modulo(given: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if given.get("fmod", 0) else torch.remainder(x, y)


def _power(_: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


def _clip(
    _: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _cast(given: Attributes, x: Tensor) -> Tensor:
    return x.to(DTYPES[given["to"]])


def _cast_like(_: Attributes, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


def _where(_: Attributes, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


def _hard_sigmoid(given: Attributes, x: Tensor) -> Tensor:
    return torch.clamp(given.get("alpha", 0.2) * x + given.get("beta", 0.5), 0, 1)


def _gelu(given: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=given.get("approximate", "none"))


def _leaky(given: Attributes, x: Tensor) -> Tensor:
    return F.leaky_relu(x, given.get("alpha", 0.01))


def _elu(given: Attributes, x: Tensor) -> Tensor:
    return F.elu(x, given.get("alpha", 1.0))


def _selu(given: Attributes, x: Tensor) -> Tensor:
    alpha, gamma = given.get("alpha", SELU[0]), given.get("gamma", SELU[1])
    return torch.mul(F.elu(x, alpha), gamma)


def _prelu(_: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


# Shapes


def _shape(given: Attributes, x: Tensor) -> Tensor:
    sizes = list(x.shape)[slice(given.get("start", 0), given.get("end"))]
    return torch.tensor(sizes, dtype=torch.int64)


def _constant(given: Attributes) -> Tensor:
    ((name, value),) = given.items()
    if name == "value":
        return torch.from_numpy(onnx.numpy_helper.to_array(value).copy())
    return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)


def _reshape(given: Attributes, x: Tensor, sizes: Ints) -> Tensor:
    if not given.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(given: Attributes, x: Tensor) -> Tensor:
    axis = given.get("axis", 1)
    rows = 1
    for size in x.shape[: axis if axis >= 0 else axis + x.ndim]:
        rows *= size
    return x.reshape(rows, -1)


def _transpose(given: Attributes, x: Tensor) -> Tensor:
    return x.permute(given.get("perm", list(range(x.ndim))[::-1]))


def _squeeze(_: Attributes, x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(_: Attributes, x: Tensor, axes: Ints) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def _expand(_: Attributes, x: Tensor, sizes: Ints) -> Tensor:
    return x.expand(np.broadcast_shapes(x.shape, tuple(sizes)))


def _tile(_: Attributes, x: Tensor, times: Ints) -> Tensor:
    return x.repeat(*times)


def _slice(
    _: Attributes,
    x: Tensor,
    starts: Ints,
    ends: Ints,
    axes: Ints | None = None,
    steps: Ints | None = None,
) -> Tensor:
    axes = range(len(starts)) if axes is None else axes
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
        taken = range(x.shape[axis])[slice(start, _end(end, x.shape[axis], step), step)]
        if step > 0:
            x = x.narrow(axis, taken.start, len(range(taken.start, taken.stop)))
            x = x if step == 1 else x[(slice(None),) * (axis % x.ndim) + (slice(None, None, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(taken), device=x.device))
    return x


def _end(end: int, size: int, step: int) -> int | None:
    """Where Python ends a slice: going down, an end before the first is no index to it."""
    return None if step < 0 and end < -size else end


def _split(given: Attributes, x: Tensor, sizes: Ints | None = None) -> tuple[Tensor, ...]:
    axis = given.get("axis", 0)
    if sizes is not None:
        return torch.split_with_sizes(x, list(sizes), axis)
    if "num_outputs" not in given:
        raise ExportMismatch("Split without sizes is not one that zipc runs in torch.")
    parts = given["num_outputs"]
    size = -(-x.shape[axis] // parts)
    last = x.shape[axis] - size * (parts - 1)
    return torch.split_with_sizes(x, [size] * (parts - 1) + [last], axis)


def _concat(given: Attributes, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, given["axis"])


def _constant_of_shape(given: Attributes, sizes: Ints) -> Tensor:
    if "value" not in given:
        return torch.zeros(*sizes)
    value = torch.from_numpy(onnx.numpy_helper.to_array(given["value"]).copy())
    return value.expand(tuple(sizes)).clone() if sizes else value.reshape(())


def _range(_: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    ends = start.item(), limit.item(), delta.item()
    return torch.arange(*ends, dtype=start.dtype, device=start.device)


def _trilu(given: Attributes, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    at = 0 if diagonal is None else int(diagonal)
    return torch.triu(x, at) if given.get("upper", 1) else torch.tril(x, at)


def _depth_to_space(given: Attributes, x: Tensor) -> Tensor:
    block = given["blocksize"]
    if given.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    b, c, h, w = x.shape
    apart = x.reshape(b, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return apart.reshape(b, c // block**2, h * block, w * block)


def _space_to_depth(given: Attributes, x: Tensor) -> Tensor:
    block = given["blocksize"]
    if given.get("mode", "DCR") != "DCR":
        raise ExportMismatch(f"SpaceToDepth '{given['mode']}' is not one that zipc runs in torch.")
    b, c, h, w = x.shape
    apart = x.reshape(b, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return apart.reshape(b, c * block**2, h // block, w // block)


def _pad(
    given: Attributes,
    x: Tensor,
    pads: Ints,
    value: Tensor | None = None,
    axes: Ints | None = None,
) -> Tensor:
    axes = range(x.ndim) if axes is None else [axis % x.ndim for axis in axes]
    both = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
    ordered = [size for axis in reversed(range(x.ndim)) for size in both.get(axis, (0, 0))]
    mode = given.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, ordered, value=0 if value is None else value.item())
    while ordered[-2:] == [0, 0]:  # torch mirrors the last axes only, and wants no others named
        ordered = ordered[:-2]
    return F.pad(x, ordered, mode={"edge": "replicate", "wrap": "circular"}.get(mode, mode))


# Reading and writing by indices


def _gather(given: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = given.get("axis", 0) % x.ndim
    if indices.ndim == 0:
        return x.index_select(axis, indices.reshape(1) % x.shape[axis]).squeeze(axis)
    found = x.index_select(axis, (indices % x.shape[axis]).reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(given: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = given.get("axis", 0)
    return torch.gather(x, axis, indices.long() % x.shape[axis])


def _gather_nd(given: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    batch = given.get("batch_dims", 0)
    rows = [
        torch.arange(size, device=x.device).reshape([-1 if i == j else 1 for j in range(batch)])
        for i, size in enumerate(x.shape[:batch])
    ]
    beside = indices.ndim - 1 - batch
    own = [row.reshape(*row.shape, *[1] * beside) for row in rows]
    return x[(*own, *(indices[..., i] for i in range(indices.shape[-1])))]


def _scatter_elements(given: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, how = given.get("axis", 0), given.get("reduction", "none")
    at = indices.long() % x.shape[axis]
    if how == "none":
        return torch.scatter(x, axis, at, updates)
    how = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[how]
    return torch.scatter_reduce(x, axis, at, updates, how)


def _scatter_nd(given: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    how = given.get("reduction", "none")
    if how not in ("none", "add"):
        raise ExportMismatch(f"ScatterND by '{how}' is not one that zipc runs in torch.")
    at = tuple(indices[..., i] for i in range(indices.shape[-1]))
    return x.index_put(at, updates, accumulate=how == "add")


def _nonzero(_: Attributes, x: Tensor) -> Tensor:
    return x.nonzero().t()


def _top_k(given: Attributes, x: Tensor, count: Ints) -> tuple[Tensor, Tensor]:
    found = torch.topk(x, count[0], given.get("axis", -1), bool(given.get("largest", 1)))
    return found.values, found.indices


def _arg_max(given: Attributes, x: Tensor) -> Tensor:
    return x.argmax(given.get("axis", 0), bool(given.get("keepdims", 1)))


def _arg_min(given: Attributes, x: Tensor) -> Tensor:
    return x.argmin(given.get("axis", 0), bool(given.get("keepdims", 1)))


def _cumulative(given: Attributes, x: Tensor, axis: Ints) -> Tensor:
    at = axis[0] if axis else 0
    x = x.flip(at) if given.get("reverse", 0) else x
    found = x.cumsum(at, dtype=x.dtype)
    found = found - x if given.get("exclusive", 0) else found
    return found.flip(at) if given.get("reverse", 0) else found


# Sums, norms and softmax


def _reduced(
    function: Callable[..., Tensor],
) -> Operator:
    def run(given: Attributes, x: Tensor, axes: Ints | None = None) -> Tensor:
        axes = axes or given.get("axes")  # an attribute before opset 18
        if not axes:
            if given.get("noop_with_empty_axes", 0):
                return x
            axes = range(x.ndim)
        return function(x, tuple(axes), bool(given.get("keepdims", 1)))

    return run


def _sum_over(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def _product_over(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _norm_over(order: int, x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(x, order, axes, keep)
    return found


def _softmax(given: Attributes, x: Tensor) -> Tensor:
    return torch.softmax(x, given.get("axis", -1))


def _log_softmax(given: Attributes, x: Tensor) -> Tensor:
    return torch.log_softmax(x, given.get("axis", -1))


def _layer_norm(given: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[given.get("axis", -1) :]
    return F.layer_norm(x, shape, scale, bias, given.get("epsilon", 1e-5))


def _rms_norm(given: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[given.get("axis", -1) :], scale, given.get("epsilon", 1e-5))


def _batch_norm(
    given: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, eps=given.get("epsilon", 1e-5))


def _instance_norm(given: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=given.get("epsilon", 1e-5))


def _group_norm(given: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, given["num_groups"], scale, bias, given.get("epsilon", 1e-5))


# Products


def _gemm(given: Attributes, x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
    x = x.t() if given.get("transA", 0) else x
    y = y.t() if given.get("transB", 0) else y
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)
    if z is None:
        return x @ y if alpha == 1 else alpha * (x @ y)
    return torch.addmm(z, x, y, beta=beta, alpha=alpha)


def _einsum(given: Attributes, *inputs: Tensor) -> Tensor:
    return torch.einsum(given["equation"], *inputs)


def _window(given: Attributes, rank: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, padding before and after, an entry an axis of space."""
    if given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ExportMismatch(f"auto_pad {given['auto_pad']} is not one that zipc runs in torch.")
    pads = list(given.get("pads", [0] * 2 * rank))
    ones = [1] * rank
    return (
        list(given.get("strides", ones)),
        list(given.get("dilations", ones)),
        pads[:rank],
        pads[rank:],
    )


def _around(before: Ints, after: Ints) -> list[int]:
    """As torch lists paddings: the last axis first."""
    pairs = list(zip(before, after, strict=True))
    return [size for pair in reversed(pairs) for size in pair]


def _convolution(
    given: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    rank = x.ndim - 2
    strides, dilations, before, after = _window(given, rank)
    if before != after:
        x = F.pad(x, _around(before, after))
        before = [0] * rank
    groups = given.get("group", 1)
    return torch.convolution(x, weight, bias, strides, before, dilations, False, [0] * rank, groups)


def _transposed(given: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    if "output_shape" in given:
        raise ExportMismatch("ConvTranspose by output_shape is not one that zipc runs in torch.")
    strides, dilations, before, after = _window(given, rank)
    more = list(given.get("output_padding", [0] * rank))
    groups = given.get("group", 1)
    if before == after:
        return torch.convolution(x, weight, bias, strides, before, dilations, True, more, groups)
    y = torch.convolution(x, weight, bias, strides, [0] * rank, dilations, True, more, groups)
    return F.pad(y, [-size for size in _around(before, after)])


def _max_pool(given: Attributes, x: Tensor) -> Tensor:
    kernel = given["kernel_shape"]
    strides, dilations, before, after = _window(given, len(kernel))
    ceil = bool(given.get("ceil_mode", 0))
    if before != after or any(2 * b > k for b, k in zip(before, kernel, strict=True)):
        x = F.pad(x, _around(before, after), value=float("-inf"))
        before = [0] * len(kernel)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return pool(x, kernel, strides, before, dilations, ceil)


def _average_pool(given: Attributes, x: Tensor) -> Tensor:
    kernel = given["kernel_shape"]
    strides, dilations, before, after = _window(given, len(kernel))
    counted = bool(given.get("count_include_pad", 0))
    if any(d != 1 for d in dilations) or (before != after and not counted):
        raise ExportMismatch("AveragePool of this padding is not one that zipc runs in torch.")
    if before != after:
        x, before = F.pad(x, _around(before, after)), [0] * len(kernel)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return pool(x, kernel, strides, before, bool(given.get("ceil_mode", 0)), counted)


def _global_average(_: Attributes, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _global_max(_: Attributes, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def _resize(
    given: Attributes,
    x: Tensor,
    _region: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Ints | None = None,
) -> Tensor:
    """Of the axes of space, as torch itself does it."""
    mode = given.get("mode", "nearest")
    how = given.get("coordinate_transformation_mode", "half_pixel")
    rounding = given.get("nearest_mode", "round_prefer_floor")
    if given.get("axes"):
        raise ExportMismatch("Resize of some axes is not one that zipc runs in torch.")
    if sizes is None and scales is not None:
        sizes = [int(n * f) for n, f in zip(x.shape, scales.tolist(), strict=True)]
        whole = all(n * f == s for n, f, s in zip(x.shape, scales.tolist(), sizes, strict=True))
    else:
        whole = True
    wanted = list(sizes or ())[2:]
    grows = all(s % n == 0 for s, n in zip(wanted, x.shape[2:], strict=True))
    unusual = any(given.get(k, 0) for k in ("antialias", "exclude_outside"))
    if not unusual and whole and len(wanted) == x.ndim - 2:
        corners = how == "align_corners"
        plain = corners or how == "half_pixel" or (how == "pytorch_half_pixel" and min(wanted) > 1)
        if mode == "nearest" and (how, rounding) == ("asymmetric", "floor"):
            return F.interpolate(x, wanted, mode="nearest")
        if mode == "nearest" and (how, rounding) == ("half_pixel", "round_prefer_floor") and grows:
            return F.interpolate(x, wanted, mode="nearest-exact")
        if mode == "linear" and plain:
            named = ("linear", "bilinear", "trilinear")[x.ndim - 3]
            return F.interpolate(x, wanted, mode=named, align_corners=corners)
        if mode == "cubic" and plain:
            return F.interpolate(x, wanted, mode="bicubic", align_corners=corners)
    raise ExportMismatch(f"Resize '{mode}' of '{how}' is not one that zipc runs in torch.")


def _grid_sample(given: Attributes, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(given.get("mode", "linear"), "nearest")
    corners = bool(given.get("align_corners", 0))
    return F.grid_sample(x, grid, mode, given.get("padding_mode", "zeros"), corners)


# Attention


def _rotary(
    given: Attributes,
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor | None = None,
) -> Tensor:
    flat = x.ndim == 3
    if flat:  # (batch, sequence, heads x size)
        heads = given["num_heads"]
        turned = x.reshape(*x.shape[:2], heads, x.shape[2] // heads)
    else:  # (batch, heads, sequence, size)
        turned = x.transpose(1, 2)
    if positions is not None:
        cosines, sines = cosines[positions], sines[positions]
    size = given.get("rotary_embedding_dim", 0) or turned.shape[-1]
    head, rest = turned[..., :size], turned[..., size:]
    cosines, sines = cosines[..., None, : size // 2], sines[..., None, : size // 2]
    pairs = given.get("interleaved", 0)
    first, second = (head[..., 0::2], head[..., 1::2]) if pairs else head.chunk(2, dim=-1)
    real, imaginary = first * cosines - second * sines, first * sines + second * cosines
    joined = (
        torch.stack((real, imaginary), dim=-1).flatten(-2)
        if pairs
        else torch.cat((real, imaginary), dim=-1)
    )
    found = torch.cat((joined, rest), dim=-1) if rest.shape[-1] else joined
    return found.reshape(x.shape) if flat else found.transpose(1, 2)


def _attention(
    given: Attributes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The result, and keys and values with what came before them."""
    if given.get("softcap", 0.0) or given.get("qk_matmul_output_mode", 0):
        raise ExportMismatch("Attention with a cap is not one that zipc runs in torch.")
    flat = q.ndim == 3
    if flat:
        q = _heads(q, given["q_num_heads"])
        k, v = _heads(k, given["kv_num_heads"]), _heads(v, given["kv_num_heads"])
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), dim=2), torch.cat((past_value, v), dim=2)
    causal = bool(given.get("is_causal", 0))
    if causal and (mask is not None or past_key is not None):
        raise ExportMismatch("Causal attention with a mask is not one that zipc runs in torch.")
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=causal,
        scale=given.get("scale"),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return (y.transpose(1, 2).flatten(2) if flat else y), k, v


def _heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:2], count, x.shape[2] // count).transpose(1, 2)


OPERATORS: Mapping[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "ArgMax": _arg_max,
    "ArgMin": _arg_min,
    "Attention": _attention,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _plain(torch.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Cos": _plain(torch.cos),
    "CumSum": _cumulative,
    "DepthToSpace": _depth_to_space,
    "Div": _divide,
    "Einsum": _einsum,
    "Elu": _elu,
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _plain(torch.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "GridSample": _grid_sample,
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(F.hardswish),
    "Identity": _plain(lambda x: x),
    "InstanceNormalization": _instance_norm,
    "IsNaN": _plain(torch.isnan),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky,
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Log": _plain(torch.log),
    "LogSoftmax": _log_softmax,
    "MatMul": _plain(torch.matmul),
    "Max": _folded(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _folded(torch.minimum),
    "Mish": _plain(F.mish),
    "Mod": _modulo,
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "NonZero": _nonzero,
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": _power,
    "RMSNormalization": _rms_norm,
    "Range": _range,
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL1": _reduced(partial(_norm_over, 1)),
    "ReduceL2": _reduced(partial(_norm_over, 2)),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceProd": _reduced(_product_over),
    "ReduceSum": _reduced(_sum_over),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "RotaryEmbedding": _rotary,
    "Round": _plain(torch.round),
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Selu": _selu,
    "Shape": _shape,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _plain(F.softplus),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Sum": _folded(torch.add),
    "Tan": _plain(torch.tan),
    "Tanh": _plain(torch.tanh),
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    "Xor": _plain(torch.logical_xor),
}
