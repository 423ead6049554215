"""What becomes one operator is what that operator computes; what only looks like it stays."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipc.exporters.finish import finish
from zipc.exporters.onnx_export import export_dense
from zipc.pruner.graph.trace import trace

AXES = {"x": {0: "batch", 1: "length"}}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operators(function: Callable[[Tensor], Tensor], example: Tensor, *others: Tensor) -> list[str]:
    """The operators of a function's graph, which must compute what the function does."""
    module = nn.Module()
    module.forward = function
    axes = AXES if example.dim() == 3 else {"x": {0: "batch"}}
    program = trace(module, {"x": example}, dynamic=axes)
    graph = export_dense(program.exported, {"x": example}, outputs=[(0, "result")], dynamic=axes)
    finish(graph)
    model = graph.to_proto()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for x in (example, *others):
        got = session.run(None, {"x": x.numpy()})[0]
        np.testing.assert_allclose(got, function(x).numpy(), atol=2e-5)
    return [n.op_type for n in model.graph.node]


WEIGHT = drawn(8, seed=9) + 1.0


def rms(x: Tensor, *, power: float = 2.0, axis: int = -1, centre: float = 0.0) -> Tensor:
    mean = (x - centre).abs().pow(power).mean(axis, keepdim=True)
    return WEIGHT * (x * torch.rsqrt(mean + 1e-5))


def plain_rms(x: Tensor) -> Tensor:
    return WEIGHT * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def test_an_rms_norm_is_one_operator() -> None:
    found = operators(plain_rms, drawn(2, 5, 8), drawn(3, 1, 8))
    assert found == ["RMSNormalization"]


def test_an_rms_norm_by_division_is_one_operator() -> None:
    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * WEIGHT

    assert operators(norm, drawn(2, 5, 8)) == ["RMSNormalization"]


@pytest.mark.parametrize(
    "settings", [{"power": 3.0}, {"axis": 1}, {"centre": 0.5}], ids=["cube", "axis", "shifted"]
)
def test_other_norms_stay(settings: dict[str, float]) -> None:
    found = operators(lambda x: rms(x, **settings), drawn(2, 5, 8))  # type: ignore[arg-type]
    assert "RMSNormalization" not in found


def gelu(x: Tensor, *, cubic: float = 0.044715, half: float = 0.5) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + cubic * torch.pow(x, 3.0))
    return half * x * (1.0 + torch.tanh(inner))


def test_a_tanh_gelu_is_one_operator() -> None:
    assert operators(gelu, drawn(2, 5, 8)) == ["Gelu"]


@pytest.mark.parametrize("settings", [{"cubic": 0.05}, {"half": 0.6}], ids=["cubic", "half"])
def test_other_activations_stay(settings: dict[str, float]) -> None:
    assert "Gelu" not in operators(lambda x: gelu(x, **settings), drawn(2, 5, 8))


def turned(
    x: Tensor, *, interleaved: bool = False, equal: bool = True, back: bool = False
) -> Tensor:
    """Two heads of size 4, turned by their place in the sequence."""
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    place = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.1])
    angles = torch.cat([place, place if equal else place * 0.5], -1)[None]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    if interleaved:
        rotated = torch.stack([-heads[..., 1::2], heads[..., ::2]], -1).flatten(-2)
    elif back:
        rotated = torch.cat([heads[..., 2:], -heads[..., :2]], -1)
    else:
        rotated = torch.cat([-heads[..., 2:], heads[..., :2]], -1)
    return (heads * cos + rotated * sin).transpose(1, 2).flatten(2)


def test_a_rotary_embedding_is_one_operator_at_any_batch_and_length() -> None:
    found = operators(turned, drawn(2, 5, 8), drawn(1, 1, 8), drawn(3, 9, 8))
    assert found.count("RotaryEmbedding") == 1
    assert "Neg" not in found


@pytest.mark.parametrize(
    "settings",
    [{"interleaved": True}, {"equal": False}, {"back": True}],
    ids=["interleaved", "unequal", "backwards"],
)
def test_other_rotations_stay(settings: dict[str, bool]) -> None:
    found = operators(lambda x: turned(x, **settings), drawn(2, 5, 8), drawn(1, 3, 8))
    assert "RotaryEmbedding" not in found


def attended(x: Tensor, *, mask: Tensor | None = None) -> Tensor:
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    found = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
    return found.transpose(1, 2).flatten(2)


def test_a_mask_that_hides_nothing_is_dropped() -> None:
    def attend(x: Tensor) -> Tensor:
        mask = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool)
        return attended(x, mask=mask.expand(x.shape[0], 1, x.shape[1], x.shape[1]))

    assert operators(attend, drawn(2, 5, 8), drawn(1, 2, 8)) == ["Attention"]


def test_a_mask_that_hides_something_stays() -> None:
    def attend(x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1])[None, None, None, :] != 1
        return attended(x, mask=mask)

    found = operators(attend, drawn(2, 5, 8), drawn(1, 3, 8))
    assert found.count("Attention") == 1
    assert "Where" in found


def test_heads_taken_in_another_order_are_no_attention_operator() -> None:
    def attend(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 2)).permute(0, 3, 1, 2)  # heads are the inner axis here
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)

    assert "Attention" not in operators(attend, drawn(2, 5, 8))


@pytest.mark.parametrize("keepdim", [True, False])
def test_the_mean_over_an_image_is_a_pooling(keepdim: bool) -> None:
    def pool(x: Tensor) -> Tensor:
        return x.mean((-1, -2), keepdim=keepdim).relu()

    assert "GlobalAveragePool" in operators(pool, drawn(2, 3, 4, 5))


def test_a_mean_over_another_axis_is_no_pooling() -> None:
    def mean(x: Tensor) -> Tensor:
        return x.mean((1, 3))

    assert "GlobalAveragePool" not in operators(mean, drawn(2, 3, 4, 5))
