"""A mixture of experts gives the same when each expert sees only its tokens."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.values import randomise_
from zipc.exporters.finish import finish
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.onnx_export import check_parity, export_dense
from zipc.exporters.site_graph import extract
from zipc.pruner.graph.sites import find_sites
from zipc.pruner.graph.trace import trace

AXES = {"x": {0: "batch", 1: "sequence"}}


class Expert(nn.Module):
    def __init__(self, *, gated: bool, inner: int) -> None:
        super().__init__()
        self.gated = gated
        self.up = nn.Linear(8, 2 * inner if gated else inner, bias=False)
        self.down = nn.Linear(inner, 8, bias=False)

    def forward(self, tokens: Tensor, share: Tensor) -> Tensor:
        h = self.up(tokens)
        if self.gated:
            gate, value = h.chunk(2, -1)
            h = F.silu(gate) * value
        else:
            h = F.relu(h)
        return self.down(h * share)


class Mixture(nn.Module):
    """Experts of which every token is sent to `chosen`."""

    def __init__(self, *, chosen: int = 2, gated: bool = True, inner: int = 6) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(Expert(gated=gated, inner=inner) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 8)
        weights, index = torch.topk(self.router(tokens).softmax(-1), self.chosen, dim=-1)
        shares = tokens.new_zeros(tokens.shape[0], 4).scatter(1, index, weights)
        made = sum(e(tokens, shares[:, i : i + 1]) for i, e in enumerate(self.experts))
        return x + made.view(x.shape)


def drawn(module: nn.Module) -> nn.Module:
    randomise_(module)
    return module.eval().requires_grad_(False)


def exported(module: nn.Module) -> OnnxGraph:
    example = {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}
    program = trace(module, example, dynamic=AXES)
    return export_dense(program.exported, example, outputs=[(0, "result")], dynamic=AXES)


def output(graph: OnnxGraph, x: Tensor) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_experts_on_their_own_tokens_equal_torch(gated: bool, chosen: int) -> None:
    module = drawn(Mixture(chosen=chosen, gated=gated))
    graph = exported(module)
    finish(graph)
    counts = graph.op_counts()
    assert counts["ScatterND"] == 4
    for batch, length in ((2, 5), (1, 1), (3, 9)):  # at one token most experts see none
        x = torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(length))
        check_parity([output(graph, x)], [module(x).numpy()], bound=1e-5, what="mixture")


def test_biases_are_added_to_every_token() -> None:
    """A map that lost inputs may get a bias, and that of an expert is not for its tokens alone."""
    module = drawn(Mixture())
    for expert in module.experts:
        expert.down.bias = nn.Parameter(torch.randn(8), requires_grad=False)
    graph = exported(module)
    finish(graph)
    assert graph.op_counts()["ScatterND"] == 4
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(3))
    check_parity([output(graph, x)], [module(x).numpy()], bound=1e-5, what="mixture")


def test_the_tokens_of_an_expert_are_priced_as_the_router_sends_them() -> None:
    module = drawn(Mixture())
    example = {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}
    program = trace(module, example, dynamic=AXES)
    graph = export_dense(program.exported, example, outputs=[(0, "result")], dynamic=AXES)
    site = next(s for s in find_sites(program).sites if s.kind == "ffn")
    part = extract(graph, site)
    assert {"TopK", "Softmax"} <= set(part.op_counts())
    finish(part)
    assert part.op_counts()["NonZero"] == 1
    flat = [part.shapes[i.name] for i in part.proto.graph.input if len(part.shapes[i.name]) == 2]
    assert flat
    assert {str(shape[0]) for shape in flat} <= {"batch*sequence", "sequence*batch"}  # known names


def test_a_sum_that_is_no_mixture_stays() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.empty(3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x.reshape(-1, 8), self.stack).sum(0)

    module = drawn(Plain())
    graph = exported(module)
    finish(graph)
    assert graph.op_counts()["ScatterND"] == 0
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    check_parity([output(graph, x)], [module(x).numpy()], bound=1e-5, what="plain")
