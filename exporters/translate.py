"""ONNX translations of our own, for operations whose stock translation prunes or runs badly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper

from zipc.core.errors import UnsupportedModel

MASKED = -1e9  # added to a score that must not count; its exponential is 0 in every precision


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table that `torch.onnx.export` takes."""
    aten = torch.ops.aten
    return {
        aten.scaled_dot_product_attention.default: _attention,
        aten.linear.default: _linear,
        aten.group_norm.default: _group_norm,
        aten.instance_norm.default: _instance_norm,
        aten.adaptive_avg_pool1d.default: _adaptive_pool,
        aten.adaptive_avg_pool2d.default: _adaptive_pool,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split_with_sizes,
    }


def _ops() -> Any:
    """Operators of the opset we export to; Any, for its type variables know no traced values."""
    from onnxscript import opset20

    return opset20


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x w' + b; the weight is transposed by a node of its own, which is stored away later."""
    op = _ops()
    transposed = op.Transpose(weight, perm=[1, 0])
    if len(x.shape) == 2:
        return op.Gemm(x, transposed, bias)
    product = op.MatMul(x, transposed)
    return product if bias is None else op.Add(product, bias)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q k' scale + mask) v, as the operators every runtime has kernels for.

    Repeated keys and values of grouped queries and the causal mask are written out; they go where
    all of it becomes one operator (`finish.fuse_attention_`).
    """
    op = _ops()
    factor = float(scale) if scale is not None else 1.0 / math.sqrt(query.shape[-1])
    mask = _lower_triangle(query, key) if is_causal else attn_mask
    if is_causal or (mask is not None and int(mask.dtype) == TensorProto.BOOL):
        mask = op.Where(mask, op.Constant(value_float=0.0), op.Constant(value_float=MASKED))
    if enable_gqa and key.shape[-3] not in (1, query.shape[-3]):  # one head is broadcast
        groups = query.shape[-3] // key.shape[-3]
        key, value = _repeated(key, groups), _repeated(value, groups)
    turned = op.Transpose(key, perm=_swapped(query))
    scores = op.MatMul(op.Mul(query, op.Constant(value_float=factor)), turned)
    if mask is not None:
        scores = op.Add(scores, mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _repeated(x: Any, groups: int) -> Any:
    """(batch, heads, keys, size) with every head `groups` times in a row."""
    op = _ops()
    at = len(x.shape) - 2
    apart = op.Unsqueeze(x, op.Constant(value_ints=[at]))
    copies = op.Expand(apart, op.Constant(value_ints=[1] * at + [groups, 1, 1]))
    target = op.Concat(op.Constant(value_ints=[0] * (at - 1) + [-1]), op.Shape(x, start=at), axis=0)
    merged = op.Reshape(copies, target)
    sizes = list(x.shape)
    sizes[at - 1] *= groups
    merged.shape, merged.dtype = type(x.shape)(sizes), x.dtype
    return merged


def _lower_triangle(query: Any, key: Any) -> Any:
    """(1, 1, queries, keys) bool: no query sees a later key."""
    op = _ops()
    rows, columns = (
        op.Unsqueeze(_counted(_size(x)), op.Constant(value_ints=[axis]))
        for x, axis in ((query, 1), (key, 0))
    )
    return op.Unsqueeze(op.LessOrEqual(columns, rows), op.Constant(value_ints=[0, 1]))


def _size(x: Any) -> Any:
    """The size of the axis before the last, as a scalar."""
    op = _ops()
    at = len(x.shape) - 2
    return op.Squeeze(op.Shape(x, start=at, end=at + 1))


def _counted(size: Any) -> Any:
    """0, 1, ..., size - 1."""
    op = _ops()
    return op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1))


def _group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Instance norm over (batch, groups, the rest); `resize_` knows it by its operator."""
    op = _ops()
    ones = op.Constant(value_floats=[1.0] * num_groups)
    zeros = op.Constant(value_floats=[0.0] * num_groups)
    grouped = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
    normal = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), op.Shape(x))
    axes = op.Constant(value_ints=list(range(1, len(x.shape) - 1)))
    for operator, value in ((op.Mul, weight), (op.Add, bias)):
        normal.shape, normal.dtype = x.shape, x.dtype  # inference does not look through Shape
        if value is not None:
            normal = operator(normal, op.Unsqueeze(value, axes))
    return normal


def _instance_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """Statistics of each channel alone, or those of training; `resize_` knows both operators."""
    op = _ops()
    scale = op.Constant(value_floats=[1.0] * x.shape[1]) if weight is None else weight
    shift = op.Constant(value_floats=[0.0] * x.shape[1]) if bias is None else bias
    if use_input_stats:
        return op.InstanceNormalization(x, scale, shift, epsilon=eps)
    return op.BatchNormalization(x, scale, shift, running_mean, running_var, epsilon=eps)


def _adaptive_pool(x: Any, output_size: Sequence[int]) -> Any:
    """Means over equal parts of every axis: of all of it, of tiles, or weighted where they lap."""
    op = _ops()
    if all(n == 1 for n in output_size):
        if len(output_size) == 2 and len(x.shape) == 4:
            return op.GlobalAveragePool(x)
        return op.ReduceMean(x, op.Constant(value_ints=list(range(-len(output_size), 0))))
    given = list(x.shape)[-len(output_size) :]
    if not all(isinstance(n, int) for n in given):
        raise UnsupportedModel("adaptive pooling to several cells needs images of one size")
    kernel = [n // out for n, out in zip(given, output_size, strict=True)]
    left = [n % out for n, out in zip(given, output_size, strict=True)]
    if not any(left) and len(x.shape) == len(output_size) + 2:
        return op.AveragePool(x, kernel_shape=list(kernel), strides=list(kernel))
    pooled = op.MatMul(x, _shares(given[-1], output_size[-1]))
    if len(output_size) == 2:
        turned = op.Transpose(pooled, perm=_swapped(x))
        pooled = op.Transpose(
            op.MatMul(turned, _shares(given[0], output_size[0])), perm=_swapped(x)
        )
    return pooled


def _shares(size: int, cells: int) -> Any:
    """(size, cells): how much of its mean every cell takes from each position."""
    shares = np.zeros((size, cells), dtype=np.float32)
    for cell in range(cells):
        begin, end = cell * size // cells, -(-(cell + 1) * size // cells)
        shares[begin:end, cell] = 1.0 / (end - begin)
    return _ops().Constant(value=numpy_helper.from_array(shares))


def _swapped(x: Any) -> list[int]:
    """The axes of a value with the last two exchanged."""
    last = len(x.shape) - 1
    return [*range(last - 1), last, last - 1]


def _split(x: Any, split_size: int, dim: int = 0) -> Any:
    width = x.shape[dim]
    if not isinstance(width, int) or not isinstance(split_size, int):
        op = _ops()
        return op.SplitToSequence(x, split_size, axis=dim)
    full, rest = divmod(width, split_size)
    return _split_with_sizes(x, [split_size] * full + [rest] * (rest > 0), dim)


def _split_with_sizes(x: Any, split_sizes: Sequence[int], dim: int = 0) -> Any:
    """One node whose outputs bear the names of the parts, instead of a sequence to pick from."""
    op = _ops()
    if len(split_sizes) == 1:
        return (op.Identity(x),)
    parts = op.Constant(value_ints=list(split_sizes))
    # the recorder counts outputs by an attribute that explicit sizes rule out: `repair_` drops it
    return op.Split(x, parts, axis=dim, num_outputs=len(split_sizes))


def repair_(model: Any) -> None:
    """Make valid ONNX of what the recorder cannot be told otherwise."""
    for node in model.graph:
        if node.op_type == "Split" and len(node.inputs) == 2:
            node.attributes.pop("num_outputs", None)
