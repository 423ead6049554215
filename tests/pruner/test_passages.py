"""Rows divided and the columns behind them multiplied leave every network what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.three_ways import EXACT, double, gap, other_feeds, tolerance
from tests.tiny_folders import family_folder
from tests.tiny_models import Case, traced
from tests.zoo import ZOO
from zipc.model_source import load_source, trace_source, with_cache
from zipc.numerics.smooth import of_channels
from zipc.pruner.graph.passages import Passage, passages
from zipc.pruner.graph.sites import find_sites

pytestmark = pytest.mark.xdist_group("zoo")

# Passages in heads, in plain or gated maps, and from norms; networks not named have none.
COUNTS = {
    "vgg": (0, 1, 0),
    "bert": (2, 0, 1),
    "bert-masked-lm": (2, 0, 0),
    "roberta": (2, 0, 1),
    "distilbert": (2, 1, 1),
    "electra": (2, 0, 2),
    "albert": (1, 0, 1),
    "mpnet": (2, 0, 1),
    "gpt2": (2, 0, 4),
    "opt": (2, 2, 4),
    "llama": (2, 2, 4),
    "llama-mqa": (0, 2, 2),
    "qwen2": (2, 2, 4),
    "mistral": (2, 2, 4),
    "phi3": (2, 2, 4),
    "mixtral": (2, 8, 2),
    "qwen2-moe": (2, 12, 2),
    "t5": (6, 4, 10),
    "t5-gated": (6, 4, 10),
    "torch-text": (4, 2, 3),
    "vit": (2, 0, 4),
    "deit": (2, 0, 4),
    "swin": (4, 0, 5),
    "pvt-v2": (2, 0, 4),
    "convnext": (0, 0, 4),
    "mobilevit": (9, 0, 18),
}


def found(made: Case) -> list[Passage]:
    return passages(made.program, made.sites)


def rescaled(made: Case, through: list[Passage]) -> dict[str, Tensor]:
    """The state of a module with random factors moved through passages."""
    generator = torch.Generator().manual_seed(0)
    state = dict(made.module.state_dict())
    for passage in through:
        (name, dim), *_ = passage.tensors.items()
        count = state[name].shape[dim]
        factors = torch.exp(torch.randn(count, generator=generator)).double()
        alive = torch.zeros(count, dtype=torch.bool)
        for module, rows in passage.readers.items():
            index = torch.tensor(rows)
            alive[index[index >= 0]] = True
            reader = made.calls[module]
            columns = of_channels(factors, index).unsqueeze(1 - reader.in_dim)
            state[reader.weight] = state[reader.weight] * columns
        factors = factors.where(alive, 1.0)
        for name, dim in passage.tensors.items():
            by = factors.unsqueeze(1 - dim) if state[name].dim() > 1 else factors
            state[name] = state[name] / by
    return state


@torch.no_grad()
def moved(made: Case, feeds: dict[str, Tensor]) -> float:
    """How far outputs are from what they were; the weights are far from what they were."""
    through = found(made)
    want = made.chosen(made.module(**feeds))
    state = rescaled(made, through)
    if through:
        weight = next(iter(through[0].tensors))
        assert float((state[weight] - made.module.state_dict()[weight]).abs().max()) > 0.1
    return gap(made.chosen(functional_call(made.module, state, (), feeds, tie_weights=False)), want)


@pytest.mark.parametrize("name", ZOO)
def test_factors_moved_through_passages_change_no_output(name: str) -> None:
    made = double(name)
    assert moved(made, other_feeds(ZOO[name])) < tolerance(ZOO[name])
    kinds = {s.name: s.kind for s in made.sites}
    of = [kinds[p.site] if p.producer in made.calls else "norm" for p in found(made)]
    assert (of.count("heads"), of.count("ffn"), of.count("norm")) == COUNTS.get(name, (0, 0, 0))
    assert len(of) == sum(COUNTS.get(name, (0, 0, 0)))


class Residual(nn.Module):
    """What a block makes of its input, or of that after a norm, added to it."""

    def __init__(self, block: nn.Module, norm: nn.Module | None = None, *, post: bool = False):
        super().__init__()
        self.block, self.norm, self.post = block, norm, post

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.norm is None else self.norm(x)
        return (y if self.post else x) + self.block(y)


def of_two_sites(norm: nn.Module) -> list[nn.Module]:
    return [Residual(Gated(), norm), Residual(Gated(), norm)]


class RMSNorm(nn.Module):
    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(16) + 0.5), offset

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x if self.offset == 0 else (self.offset + self.weight) * x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Attention(nn.Module):
    """Causal attention with `kv` heads of values among four of queries."""

    def __init__(self, kv: int) -> None:
        super().__init__()
        self.kv = kv
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.k, self.v = nn.Linear(16, 4 * kv), nn.Linear(16, 4 * kv)

    def forward(self, x: Tensor) -> Tensor:
        parts = (m(x).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=self.kv < 4)
        return self.out(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """Up, some way, down: and the way may have other readers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)
        self.side = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        u = self.up(x)
        if self.way == "relu":
            return self.down(F.relu(u))
        if self.way == "read by a gate of itself":
            return self.down(u * torch.sigmoid(u))
        if self.way == "added to another":
            return self.down(u + self.side(x))
        if self.way == "of two inputs":
            return self.down(F.relu(u)) + self.down(F.relu(self.side(x)))
        if self.way == "divides":
            return self.down(self.side(x) / (u + 9.0))
        if self.way == "squared":
            return self.down(u * u)
        if self.way == "mixed":
            return self.down(u.softmax(-1))
        if self.way == "a longer product":
            return self.down(self.side(x).sigmoid() * F.leaky_relu(u / 3.0).abs())
        if self.way == "one attends to itself":
            return self.down(F.scaled_dot_product_attention(u, u, u))
        return self.down(getattr(F, self.way)(u))


class Network(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        whole = [b if isinstance(b, Residual) else Residual(b) for b in blocks]
        self.blocks = nn.Sequential(*whole)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.blocks(self.embed(input_ids))


def network(*blocks: nn.Module) -> Case:
    torch.manual_seed(0)
    module = Network(*blocks).double().eval().requires_grad_(False)
    ids = torch.randint(60, (2, 7), generator=torch.Generator().manual_seed(1))
    return traced(module, {"input_ids": ids})


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(lambda: [Attention(4), Attention(4)], id="MHA"),
        pytest.param(lambda: [Attention(2), Attention(2)], id="GQA"),
        pytest.param(lambda: [Gated(), Gated()], id="SwiGLU"),
        pytest.param(lambda: [Plain("relu"), Plain("relu")], id="ReLU"),
        pytest.param(lambda: [Plain("a longer product"), Gated()], id="product"),
    ],
)
def test_in_double_precision_nothing_is_left_but_rounding(blocks) -> None:  # type: ignore[no-untyped-def]
    parts = blocks()
    made = network(*parts)
    assert len(found(made)) == len(parts)
    ids = torch.randint(60, (3, 9), generator=torch.Generator().manual_seed(2))
    assert moved(made, {"input_ids": ids}) < EXACT


@pytest.mark.parametrize("block", [lambda: Attention(2), Gated, lambda: Plain("gelu")])
@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(16), RMSNorm])
def test_a_norm_whose_readers_are_the_maps_of_one_site_is_a_passage(norm, block) -> None:  # type: ignore[no-untyped-def]
    made = network(Residual(block(), norm()), Residual(block(), norm()))
    through = [p for p in found(made) if p.producer.endswith("norm")]
    assert [set(p.readers) for p in through] == [
        set(next(s for s in made.sites if s.name == p.site).producers) for p in through
    ]
    assert len(through) == 2
    assert moved(made, made.example) < EXACT


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(lambda: [Residual(Gated(), nn.LayerNorm(16), post=True)], id="residual"),
        pytest.param(lambda: [Residual(Gated(), RMSNorm(1.0))], id="one plus its weight"),
        pytest.param(lambda: [Residual(Gated(), Scaled())], id="one number for all"),
        pytest.param(lambda: of_two_sites(nn.LayerNorm(16)), id="maps of two sites"),
    ],
)
def test_other_norms_are_none(blocks) -> None:  # type: ignore[no-untyped-def]
    made = network(*blocks())
    assert not [p for p in found(made) if p.producer.endswith("norm")]


def test_query_heads_of_a_group_share_the_factor_of_each_dimension_of_their_values() -> None:
    passage, *_ = found(network(Attention(2)))
    head = list(range(4))
    assert passage.readers["blocks.0.block.out"] == (*head, *head, *(4 + i for i in head * 2))


@pytest.mark.parametrize(
    "way",
    [
        "gelu",
        "silu",
        "relu6",
        "tanh",
        "read by a gate of itself",
        "added to another",
        "of two inputs",
        "squared",
        "mixed",
        "one attends to itself",
    ],
)
def test_what_a_factor_would_change_is_no_passage(way: str) -> None:
    assert not found(network(Plain(way)))


def test_a_divisor_is_no_passage_but_what_is_divided_is() -> None:
    (passage,) = found(network(Plain("divides")))
    assert passage.producer == "blocks.0.block.side"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_values_that_go_into_a_cache_keep_their_scale(tmp_path: Path, family: str) -> None:
    """A cache may hold what another model put there."""
    source = with_cache(load_source(str(family_folder(tmp_path, family))))
    program = trace_source(source)
    sites = find_sites(program).sites
    kinds = {s.name: s.kind for s in sites}
    of = {
        (kinds[p.site], "norm" in p.producer or "ln_" in p.producer)
        for p in passages(program, sites)
    }
    assert ("heads", True) in of
    assert ("heads", False) not in of


def test_of_a_map_that_gives_several_things_the_values_alone_may_be_scaled() -> None:
    made = double("gpt2")
    passage = found(made)[0]
    assert passage.producer.endswith("c_attn")
    (rows,) = passage.readers.values()
    assert rows == tuple(range(64, 96))
