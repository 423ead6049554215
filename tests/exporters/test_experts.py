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
from zipc.pruner.graph.trace import trace

AXES = {"x": {0: "batch", 1: "sequence"}}


class Mixture(nn.Module):
    """Gated experts as stacks of matrices; every token is sent to `chosen` of them."""

    def __init__(self, *, experts: int = 4, chosen: int = 2, gated: bool = True) -> None:
        super().__init__()
        self.chosen, self.gated = chosen, gated
        self.router = nn.Linear(8, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, 12 if gated else 6, 8))
        self.down = nn.Parameter(torch.empty(experts, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 8)
        weights, index = torch.topk(self.router(tokens).softmax(-1), self.chosen, dim=-1)
        experts = torch.arange(self.up.shape[0])
        chosen = (weights.unsqueeze(-1) * (index.unsqueeze(-1) == experts)).sum(1)
        h = torch.matmul(tokens, self.up.transpose(1, 2))
        if self.gated:
            gate, value = h.chunk(2, -1)
            h = F.silu(gate) * value
        else:
            h = F.relu(h)
        made = torch.matmul(h, self.down.transpose(1, 2))
        return x + (made * chosen.t().unsqueeze(-1)).sum(0).view(x.shape)


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


def test_the_matrices_follow_edits_of_the_stacks() -> None:
    """The dense graph keeps the stacks, so an expert or its width can be cut before."""
    module = drawn(Mixture(gated=False))
    graph = exported(module)
    kept = drawn(Mixture(experts=3, gated=False))
    state = module.state_dict()
    kept.load_state_dict({name: value[:3] for name, value in state.items()})
    for name, value in kept.state_dict().items():
        stored, turned = graph.weights[name]
        graph.arrays[stored] = (value.T if turned else value).numpy()
    for name, value in list(graph.arrays.items()):
        if value.dtype == np.int64 and value.tolist() == [0, 1, 2, 3]:  # the experts, numbered
            graph.arrays[name] = value[:3]
    finish(graph)
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(3))
    check_parity([output(graph, x)], [kept(x).numpy()], bound=1e-5, what="mixture")


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
