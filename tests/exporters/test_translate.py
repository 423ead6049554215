"""Operations that zipc translates itself give what torch gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipc.core.errors import UnsupportedModel
from zipc.exporters.finish import finish
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.onnx_export import export_dense
from zipc.pruner.graph.trace import trace


def exported(
    function: Callable[..., Tensor],
    values: dict[str, Tensor],
    axes: dict[str, dict[int, str]] | None = None,
) -> OnnxGraph:
    dynamic = axes if axes is not None else {name: {0: "batch"} for name in values}
    module = nn.Module()
    module.forward = function
    program = trace(module, values, dynamic=dynamic)
    return export_dense(program.exported, values, outputs=[(0, "result")], dynamic=dynamic)


def output(graph: OnnxGraph, values: dict[str, Tensor]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: values[i.name].numpy() for i in session.get_inputs()})[0]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, x.shape[-1] // count)).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_equals_torch(causal: bool, queries: int, keys: int, scale: float | None) -> None:
    """Fused and as pieces, at other sizes than those traced."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(
            heads(q @ weights[0], queries),
            heads(k @ weights[1], keys),
            heads(v @ weights[2], keys),
            is_causal=causal,
            scale=scale,
            enable_gqa=queries != keys,
        )
        return mixed.transpose(1, 2).flatten(2)

    weights = [drawn(8, 8 * n, seed=n) * 0.3 for n in (queries, keys, keys)]
    axes = {n: {0: "batch", 1: "length"} for n in "qkv"}
    values = {n: drawn(2, 5, 8, seed=i) for i, n in enumerate("qkv")}
    graph = exported(attend, values, axes)
    fused = graph.copy()
    finish(fused)
    assert fused.op_counts()["Attention"] == 1
    assert "Softmax" not in {n.op_type for n in fused.to_proto().graph.node}
    for length in (5, 1, 9):
        values = {n: drawn(3, length, 8, seed=10 + i) for i, n in enumerate("qkv")}
        want = attend(**values).numpy()
        for candidate in (graph, fused):
            np.testing.assert_allclose(output(candidate, values), want, atol=1e-5)


def test_a_causal_mask_is_made_once_for_all_layers() -> None:
    def attend(x: Tensor) -> Tensor:
        for _ in range(3):
            h = heads(x, 2)
            x = F.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(1, 2).flatten(2)
        return x

    values = {"x": drawn(2, 5, 8)}
    graph = exported(attend, values, {"x": {0: "batch", 1: "length"}})
    nodes = graph.to_proto().graph.node
    assert [n.op_type for n in nodes].count("LessOrEqual") == 1
    assert [n.op_type for n in nodes].count("Where") == 1
    longer = {"x": drawn(1, 8, 8)}
    np.testing.assert_allclose(output(graph, longer), attend(**longer).numpy(), atol=1e-5)


@pytest.mark.parametrize("rank", [3, 4])
def test_attention_keeps_its_rank(rank: int) -> None:
    def attend(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q * 0.5, q + 1.0)

    values = {"q": drawn(2, *([3] * (rank - 3)), 4, 8)}
    want = attend(**values).numpy()
    np.testing.assert_allclose(output(exported(attend, values), values), want, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (7, 5)])
def test_adaptive_pooling_equals_torch(size: tuple[int, int]) -> None:
    def pool(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, size)

    values = {"x": drawn(2, 3, 7, 9)}
    graph = exported(pool, values)
    np.testing.assert_allclose(output(graph, values), pool(**values).numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_adaptive_pooling_of_sequences_equals_torch(size: int) -> None:
    def pool(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(x, size)

    values = {"x": drawn(2, 3, 9)}
    graph = exported(pool, values)
    np.testing.assert_allclose(output(graph, values), pool(**values).numpy(), atol=1e-6)


def test_adaptive_pooling_of_images_of_any_size_to_several_cells_is_refused() -> None:
    def pool(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 2)

    with pytest.raises(UnsupportedModel, match=r"adaptive pooling|traced"):
        exported(pool, {"x": drawn(2, 3, 8, 8)}, {"x": {0: "batch", 2: "height"}})


@pytest.mark.parametrize("affine", [False, True])
def test_group_norm_equals_torch(affine: bool) -> None:
    weight, bias = (drawn(6, seed=1), drawn(6, seed=2)) if affine else (None, None)

    def norm(x: Tensor) -> Tensor:
        return F.group_norm(x, 3, weight, bias, eps=1e-4)

    values = {"x": drawn(2, 6, 4, 5)}
    graph = exported(norm, values)
    np.testing.assert_allclose(output(graph, values), norm(**values).numpy(), atol=1e-5)


@pytest.mark.parametrize("parts", [2, 5, [1, 3, 3], [7]])
def test_splits_equal_torch_and_have_names(parts: int | list[int]) -> None:
    def split(x: Tensor) -> Tensor:
        pieces = x.split(parts, 1)
        return sum(p.sum(1) * i for i, p in enumerate(pieces, 1))  # type: ignore[return-value]

    values = {"x": drawn(2, 7, 3)}
    graph = exported(split, values)
    np.testing.assert_allclose(output(graph, values), split(**values).numpy(), atol=1e-5)
    for node in graph.nodes:
        if node.op_type == "Split":
            assert all(graph.origin[o].startswith("getitem") for o in node.output)


@pytest.mark.parametrize("keys", [4, 2])
def test_attention_on_a_cache_appends_to_it(keys: int) -> None:
    """One new token sees all cached ones that its padding mask lets it see."""

    def attend(x: Tensor, mask: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k = torch.cat([k, heads(x @ weights[1], keys)], dim=2)
        v = torch.cat([v, heads(x @ weights[2], keys)], dim=2)
        mixed = F.scaled_dot_product_attention(
            heads(x @ weights[0], 4),
            k,
            v,
            attn_mask=mask[:, None, None, :].to(torch.bool),
            enable_gqa=keys != 4,
        )
        return mixed.transpose(1, 2).flatten(2), k, v

    def values(batch: int, past: int) -> dict[str, Tensor]:
        mask = torch.ones(batch, past + 1, dtype=torch.long)
        mask[0, 0] = 0
        return {
            "x": drawn(batch, 1, 8, seed=past),
            "mask": mask,
            "k": drawn(batch, keys, past, 8, seed=1),
            "v": drawn(batch, keys, past, 8, seed=2),
        }

    weights = [drawn(8, 8 * n, seed=i) * 0.3 for i, n in enumerate((4, keys, keys))]
    module = nn.Module()
    module.forward = attend
    axes = {"x": {0: "batch"}, "mask": {0: "batch", 1: "past+1"}}
    axes |= {n: {0: "batch", 2: "past"} for n in "kv"}
    program = trace(module, values(2, 5), dynamic=axes)
    names = ["result", "keys", "values"]
    graph = export_dense(
        program.exported, values(2, 5), outputs=list(enumerate(names)), dynamic=axes
    )
    fused = graph.copy()
    finish(fused)
    operators = [n.op_type for n in fused.to_proto().graph.node]
    assert operators.count("Attention") == 1
    assert not {"Softmax", "Concat"} & set(operators)
    for batch, past in ((2, 5), (1, 1), (3, 9)):
        feeds = values(batch, past)
        arrays = {n: v.numpy() for n, v in feeds.items()}
        for candidate in (graph, fused):
            options = ort.SessionOptions()
            options.log_severity_level = 3
            model = candidate.to_bytes()
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for got, want in zip(session.run(names, arrays), attend(**feeds), strict=True):
                np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
