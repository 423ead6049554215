"""Sources around a module of a few lines, and the same models as ONNX graphs written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from zipc.core.request import Request
from zipc.core.types import InputSpec
from zipc.model_source import SourceModel

PICTURE = InputSpec("pixel_values", "float32", ("batch", 3, 4, 4))
IDS = InputSpec("input_ids", "int64", ("batch", "sequence"), high=11)


class MeanColour(nn.Module):
    """Logits of an image from its mean colour: (n, 3, h, w) -> (n, C)."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": pixel_values.mean((2, 3)) @ self.weight}


class EachPixel(nn.Module):
    """Logits of every pixel from its colour: (n, 3, h, w) -> (n, C, h, w)."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(weight))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.einsum("nchw,ck->nkhw", pixel_values, self.weight)


class Lookup(nn.Module):
    """Logits of the next token from this token alone: (n, s) -> (n, s, V)."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.from_numpy(table))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.table[input_ids]}


class TwoHeads(nn.Module):
    """Two outputs of one vector: (n, d) -> (n, a), (n, b, c)."""

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.from_numpy(first))
        self.second = nn.Parameter(torch.from_numpy(second))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.first, torch.einsum("nd,dbc->nbc", x, self.second)


def source_of(
    module: nn.Module,
    *,
    specs: Sequence[InputSpec] = (PICTURE,),
    outputs: Sequence[str] = ("logits",),
    task: Any = "tensors",
    folder: Path | None = None,
    tokenizer: Any = None,
    max_length: int = 64,
) -> SourceModel:
    return SourceModel(
        module=module.eval(),
        folder=folder,
        source="tiny",
        sha256="",
        revision=None,
        config=None,
        tokenizer=tokenizer,
        max_length=max_length,
        specs=tuple(specs),
        outputs=list(enumerate(outputs)),
        task=task,
        blank=lambda: module,
        recipe={},
    )


def request_of(data: Path, **rest: Any) -> Request:
    return Request(model="tiny", data=str(data), **rest)


def mean_colour_onnx(weight: np.ndarray, *, batch_max: bool = False) -> bytes:
    """`MeanColour`; with `batch_max` the largest logit of the batch is added to all."""
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["plain" if batch_max else "logits"]),
    ]
    if batch_max:
        nodes += [
            helper.make_node("ReduceMax", ["plain"], ["top"], keepdims=1),
            helper.make_node("Add", ["plain", "top"], ["logits"]),
        ]
    shape = ["n", 3, "h", "w"]
    return graph(nodes, {"pixel_values": shape}, {"logits": ["n", "c"]}, weight=weight)


def each_pixel_onnx(weight: np.ndarray) -> bytes:
    nodes = [
        helper.make_node("Transpose", ["pixel_values"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["last", "weight"], ["product"]),
        helper.make_node("Transpose", ["product"], ["logits"], perm=[0, 3, 1, 2]),
    ]
    shape = ["n", 3, "h", "w"]
    return graph(nodes, {"pixel_values": shape}, {"logits": ["n", "c", "h", "w"]}, weight=weight)


def lookup_onnx(table: np.ndarray) -> bytes:
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits"])]
    ids = {"input_ids": ["n", "s"]}
    return graph(nodes, ids, {"logits": ["n", "s", "v"]}, integers=ids, table=table)


def two_heads_onnx(first: np.ndarray, second: np.ndarray) -> bytes:
    flat = second.reshape(len(second), -1)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["one"]),
        helper.make_node("MatMul", ["x", "flat"], ["long"]),
        helper.make_node("Reshape", ["long", "shape"], ["two"]),
    ]
    shape = np.array([-1, *second.shape[1:]])
    outputs = {"one": ["n", "a"], "two": ["n", "b", "c"]}
    return graph(nodes, {"x": ["n", "d"]}, outputs, first=first, flat=flat, shape=shape)


def graph(
    nodes: Sequence[Any],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    *,
    integers: Sequence[str] | dict[str, Any] = (),
    **tensors: np.ndarray,
) -> bytes:
    def kind(name: str) -> int:
        return TensorProto.INT64 if name in integers else TensorProto.FLOAT

    made = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info(n, kind(n), shape) for n, shape in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()
