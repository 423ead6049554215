"""A graph resized to other widths equals the module that has those widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo import dense_prediction, vision
from tests.zoo.huggingface import _made, pairs
from tests.zoo.values import VOCABULARY, images, randomise_, tokens
from zipc.exporters.finish import finish
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.onnx_export import check_parity, export_dense
from zipc.exporters.shapes import resize_
from zipc.pruner.graph.trace import Program, trace


class Everything(nn.Module):
    """Every place where an image network writes down a number of channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, 2 * width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        self.norm = nn.GroupNorm(2, 3 * width)
        self.squeeze = nn.Linear(3 * width, width)
        self.excite = nn.Linear(width, 3 * width)
        self.grouped = nn.Conv2d(3 * width, 2 * width, 1, groups=2)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2, groups=width)
        self.scale = nn.Parameter(torch.ones(1, width, 1, 1))
        self.head = nn.Linear(4 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = self.stem(x).split((self.width, self.width), 1)
        y = self.norm(torch.cat([kept, self.depthwise(worked)], 1))
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3))))).sigmoid()
        y = y * gate.view(x.shape[0], 3 * self.width, 1, 1)
        y = vision.shuffle(self.grouped(vision.shuffle(y, groups=3)), groups=2)
        y = self.up(F.relu(y)) + self.scale.expand(x.shape[0], self.width, 1, 1)
        return self.head(F.adaptive_avg_pool2d(y, 2).reshape(x.shape[0], 4 * self.width))


def _pixels(*, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": images(batch=batch, size=16, seed=seed)["x"]}


def _gpt2(heads: int) -> nn.Module:
    settings: dict[str, Any] = {"n_embd": 8 * heads, "n_head": heads, "n_inner": 5 * heads}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_layer=2, use_cache=False, **settings
    )
    return _made("GPT2LMHeadModel", config)


def _llama(kv_heads: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16 * kv_heads,
        num_hidden_layers=2,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        intermediate_size=7 * kv_heads,
        max_position_embeddings=32,
        use_cache=False,
    )
    return _made("LlamaForCausalLM", config)


def _t5(heads: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=8 * heads,
        d_kv=6,
        d_ff=5 * heads,
        num_layers=2,
        num_heads=heads,
        decoder_start_token_id=1,
        tie_word_embeddings=False,  # the tied head divides by the root of the width
        use_cache=False,
    )
    return _made("T5ForConditionalGeneration", config, feeds=pairs())


def _vit(heads: int) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=8 * heads,
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=5 * heads,
        image_size=16,
        patch_size=8,
    )
    return _made("ViTForImageClassification", config, feeds=_pixels())


def _swin(heads: int) -> nn.Module:
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=4 * heads,
        depths=[2, 2],
        num_heads=[heads, 2 * heads],
        window_size=2,
        mlp_ratio=1.5,
    )
    return _made("SwinForImageClassification", config, feeds=_pixels())


def _convnext(width: int) -> nn.Module:
    config = transformers.ConvNextConfig(
        hidden_sizes=[width, 2 * width], depths=[1, 1], num_stages=2, patch_size=2, image_size=16
    )
    return _made("ConvNextForImageClassification", config, feeds=_pixels())


def _drawn(module: nn.Module) -> nn.Module:
    randomise_(module)
    return module.eval().requires_grad_(False)


def _plain(make: Callable[..., nn.Module], *widths: Any) -> tuple[nn.Module, nn.Module]:
    wide, narrow = (_drawn(make(w)) for w in widths)
    return wide, narrow


IMAGE = {"x": {0: "batch"}}
PIXELS = {"pixel_values": {0: "batch"}}
TEXT = {n: {0: "batch", 1: "sequence"} for n in ("input_ids", "attention_mask")}
SMALL = partial(images, size=16)
PAIRS = {
    "everything": lambda: (_plain(Everything, 6, 4), SMALL, IMAGE),
    "vgg": lambda: (
        _plain(vision.Vgg, (4, None, 6, None, 8, None), (3, None, 5, None, 2, None)),
        SMALL,
        IMAGE,
    ),
    "resnet": lambda: (_plain(lambda w: vision.CifarResNet(width=w), 4, 4), SMALL, IMAGE),
    "resnext": lambda: (
        _plain(lambda w: vision.BottleneckResNet(inner=w, groups=2), 8, 6),
        images,
        IMAGE,
    ),
    "densenet": lambda: (_plain(lambda g: vision.DenseNet(growth=g), 4, 2), SMALL, IMAGE),
    "detector": lambda: (
        _plain(lambda b: dense_prediction.Yolo(classes=b, bins=b), 5, 3),
        images,
        IMAGE,
    ),
    "gpt2": lambda: ((_gpt2(4), _gpt2(3)), tokens, TEXT),
    "llama": lambda: ((_llama(3), _llama(2)), tokens, TEXT),
    "t5": lambda: (
        (_t5(4), _t5(3)),
        pairs,
        TEXT | {"decoder_input_ids": {0: "batch", 1: "target"}},
    ),
    "vit": lambda: (
        (_vit(4), _vit(3)),
        _pixels,
        PIXELS,
    ),
    "swin": lambda: (
        (_swin(3), _swin(2)),
        _pixels,
        PIXELS,
    ),
    "convnext": lambda: (
        (_convnext(8), _convnext(5)),
        _pixels,
        PIXELS,
    ),
}


def _traced(module: nn.Module, example: dict[str, Tensor], axes: Any) -> Program:
    return trace(module, example, dynamic=axes, limits={"sequence": 32, "target": 32, "batch": 64})


def _first(result: Any) -> Tensor:
    value: Tensor = result if isinstance(result, Tensor) else result[0]
    return value


def _output(graph: OnnxGraph, feeds: Mapping[str, Tensor]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name].numpy() for i in session.get_inputs()})[0]


@pytest.mark.parametrize("name", PAIRS)
def test_a_resized_graph_equals_the_module_of_that_size(name: str) -> None:
    """The same architecture twice: its weights and its sizes turn one graph into the other."""
    (wide, narrow), example, axes = PAIRS[name]()
    graph = export_dense(
        _traced(wide, example(), axes).exported, example(), outputs=[(0, "result")], dynamic=axes
    )
    small = _traced(narrow, example(), axes)
    shapes = {n.name: n.meta["val"].shape for n in small.nodes if _is_tensor(n)}

    def size_of(node: str, axis: int) -> int | None:
        size = shapes[node][axis]
        return size if isinstance(size, int) else None

    tensors = dict(small.tensors.values())
    for parameter, (stored, turned) in graph.weights.items():
        if parameter in tensors:
            value = tensors[parameter]
            graph.arrays[stored] = (value.T if turned else value).numpy()
    resize_(graph, size_of)
    finish(graph)
    for feeds in (example(), example(batch=3, seed=1)):
        check_parity(
            [_output(graph, feeds)], [_first(narrow(**feeds)).numpy()], bound=1e-4, what=name
        )


def _is_tensor(node: Any) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def test_resizing_to_the_same_sizes_changes_nothing() -> None:
    module, example = _drawn(Everything(4)), SMALL()
    program = _traced(module, example, IMAGE)
    graph = export_dense(program.exported, example, outputs=[(0, "result")], dynamic=IMAGE)
    before = graph.to_bytes()
    resize_(graph, lambda node, axis: None)
    assert graph.to_bytes() == before
