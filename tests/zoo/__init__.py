"""Every family zipc claims to support, as a tiny random model with an example input.

A test that means every family goes through `ZOO`. Graphs on which a naive tool is silently wrong
are in `adversarial`, random ones in `random_graphs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import dense_prediction, huggingface, torch_text, vision
from tests.zoo.values import images, ready, sounds, tokens

LONGEST = 28  # tokens; the position tables of some families begin a few rows later
Axes = dict[str, dict[int, str]]


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of network: how to build one, and what to feed it.

    `build` gives evaluation mode without gradients; the module is called with the keywords that
    `example` returns. `example` takes `batch`, `seed` and, for text, `length`, for images `size`.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[..., dict[str, Tensor]]
    dynamic: Axes  # input -> axis -> the size it shares
    modality: str  # "image" or "text"
    float64: bool = True  # False: it rounds activations to float32 inside, in any dtype
    as_traced: bool = False  # its code does not follow when sites shrink: its graph has to

    def shapes(self) -> dict[str, dict[int, Any]]:
        """The `dynamic_shapes` of torch.export for the example."""
        sizes = {s for axes in self.dynamic.values() for s in axes.values()}
        dims = {s: torch.export.Dim(s, max=64 if s == "batch" else LONGEST) for s in sizes}
        return {
            name: {axis: dims[size] for axis, size in axes.items()}
            for name, axes in self.dynamic.items()
        }


_IMAGE: Axes = {"x": {0: "batch"}}
_PIXELS: Axes = {"pixel_values": {0: "batch"}}
_TEXT: Axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
_TYPED: Axes = _TEXT | {"token_type_ids": {0: "batch", 1: "sequence"}}
_PAIR: Axes = _TEXT | {"decoder_input_ids": {0: "batch", 1: "target"}}


def _image(name: str, make: Callable[[], nn.Module], *, size: int = 32) -> Family:
    """A plain torch model; its values are drawn after it is made."""
    example = partial(images, size=size)
    return Family(name, lambda: ready(make(), example()), example, _IMAGE, "image")


def _pixels(
    name: str, build: Callable[[], nn.Module], *, size: int = 16, as_traced: bool = False
) -> Family:
    example = partial(huggingface.pixels, size=size)
    return Family(name, build, example, _PIXELS, "image", as_traced=as_traced)


def sound_net() -> nn.Module:
    return ready(vision.SoundNet(), sounds())


ZOO: dict[str, Family] = {
    f.name: f
    for f in (
        _image("cifar-resnet8", vision.CifarResNet, size=16),
        _image("cifar-resnet20", partial(vision.CifarResNet, 20), size=16),
        _image("bottleneck-resnet", vision.BottleneckResNet),
        _image("resnext", partial(vision.BottleneckResNet, inner=8, groups=2)),
        _image("groupnorm", vision.GroupNormNet, size=16),
        _image("instancenorm", vision.InstanceNormNet, size=16),
        _image("vgg", vision.Vgg, size=16),
        _image("googlenet", vision.GoogLeNet, size=16),
        _image("densenet", vision.DenseNet, size=16),
        _image("mobilenet-v2", vision.MobileNetV2),
        _image("mobilenet-v3", vision.MobileNetV3),
        _image("shufflenet", vision.ShuffleNet, size=16),
        _image("unet", dense_prediction.UNet, size=16),
        _image("unet-upsample", partial(dense_prediction.UNet, transposed=False), size=16),
        Family("sounds", sound_net, sounds, _IMAGE, "image"),
        Family("yolo", dense_prediction.detector, images, _IMAGE, "image"),
        Family("bert", huggingface.bert, partial(tokens, types=True), _TYPED, "text"),
        Family(
            "bert-masked-lm",
            huggingface.bert_masked_lm,
            partial(tokens, types=True),
            _TYPED,
            "text",
        ),
        Family("roberta", huggingface.roberta, tokens, _TEXT, "text"),
        Family("distilbert", huggingface.distilbert, tokens, _TEXT, "text"),
        Family("electra", huggingface.electra, partial(tokens, types=True), _TYPED, "text"),
        Family("albert", huggingface.albert, partial(tokens, types=True), _TYPED, "text"),
        Family("mpnet", huggingface.mpnet, tokens, _TEXT, "text"),
        Family("gpt2", huggingface.gpt2, tokens, _TEXT, "text"),
        Family("opt", huggingface.opt, tokens, _TEXT, "text"),
        Family("llama", huggingface.llama, tokens, _TEXT, "text", float64=False),
        Family("llama-mqa", huggingface.llama_one_kv_head, tokens, _TEXT, "text", float64=False),
        Family("qwen2", huggingface.qwen2, tokens, _TEXT, "text", float64=False),
        Family("mistral", huggingface.mistral, tokens, _TEXT, "text", float64=False),
        Family("phi3", huggingface.phi3, tokens, _TEXT, "text", float64=False, as_traced=True),
        Family("mixtral", huggingface.mixtral, tokens, _TEXT, "text", float64=False),
        Family("qwen2-moe", huggingface.qwen2_moe, tokens, _TEXT, "text", float64=False),
        Family("t5", huggingface.t5, huggingface.pairs, _PAIR, "text", float64=False),
        Family("t5-gated", huggingface.t5_gated, huggingface.pairs, _PAIR, "text", float64=False),
        Family("torch-text", torch_text.encoder_decoder, torch_text.pairs, torch_text.AXES, "text"),
        _pixels("vit", huggingface.vit),
        _pixels("deit", huggingface.deit),
        _pixels("swin", huggingface.swin),
        _pixels("pvt-v2", huggingface.pvt_v2, size=32, as_traced=True),
        _pixels("convnext", huggingface.convnext),
        _pixels("resnet", huggingface.resnet, size=32),
        _pixels("mobilevit", huggingface.mobilevit, size=32),
        _pixels("efficientnet", huggingface.efficientnet, size=32),
    )
}
