"""Transformers as people write them: their code says `reshape(batch, length, channels)` after
attention, and heads can go all the same."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zipc
from tests.plain_levels import plain_levels
from zipc.build import build, checkpoint
from zipc.core.request import Request
from zipc.core.types import Allocation, InputSpec, Level, Silent
from zipc.inspect import inspect_model
from zipc.model_source import load_source, settle
from zipc.numerics.int8 import DYNAMIC
from zipc.prepare import Prepared, prepare
from zipc.pruner.compensate.propagate import propagate
from zipc.pruner.graph.as_traced import AsTraced
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.levels import Levels
from zipc.stage_cache import StageCache

NETS = '''
import math

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS = 24, 3

class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        mask = torch.tril(torch.ones(16, 16)) == 0
        self.register_buffer("mask", mask, persistent=False)
    def forward(self, x):
        batch, length, channels = x.size()
        q, k, v = self.qkv(x).split(channels, dim=2)
        shape = batch, length, HEADS, channels // HEADS
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(self.mask[:length, :length], float("-inf")).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).contiguous().view(batch, length, channels))

class Full(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
    def forward(self, x):
        batch, length, channels = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).reshape(batch, length, channels))

class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = attention()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))

class Language(nn.Module):
    """Its last map has the weight of its embedding."""
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(800, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block(Causal) for _ in range(2))
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 800, bias=False)
        self.last.weight = self.words.weight
    def forward(self, ids, scale=None):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.last(self.norm(x)), {"states": x, "nothing": None}

class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.Sequential(*(Block(Full) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])

class Follows(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 5)
    def forward(self, x):
        return self.down(F.relu(self.up(x)))

def language():
    return Language()
def vision():
    return Vision()
def follows():
    return Follows()
'''
INPUTS = {
    "language": InputSpec("ids", "int64", (1, 12), 800),
    "vision": InputSpec("x", "float32", (1, 3, 16, 16)),
    "follows": InputSpec("x", "float32", (1, 8)),
}


def prepared(folder: Path, name: str) -> Prepared:
    file = folder / "nets.py"
    file.write_text(NETS)
    source = load_source(f"{file}:{name}", input_shapes=[INPUTS[name]])
    request = settle(Request(model=f"{file}:{name}"), source)
    return prepare(source, request, cache=StageCache(folder / "cache"), progress=Silent())


@pytest.fixture(scope="module", params=["language", "vision"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def levels(made: Prepared) -> Levels:
    return plain_levels(made, [made.example(batch=8, length=12)])


def allocations(made: Prepared) -> dict[str, Allocation]:
    kinds = {
        "less": lambda s: Level(max(1, s.units - 1)),
        "rounded": lambda s: Level(max(1, s.units // 2), DYNAMIC),
        "removed": lambda s: Level(0 if s.removable else s.units),
        "first-removed": lambda s: Level(0 if s.removable and ".0." in s.name else s.units),
    }
    return {
        name: Allocation({n: level(s) for n, s in made.sites.items()}, 1.0, 0.0)
        for name, level in kinds.items()
    }


def test_heads_are_found_and_the_module_is_its_graph(made: Prepared) -> None:
    heads = [s for s in made.structure.sites if s.kind == "heads"]
    assert [s.units for s in heads] == [3, 3]
    assert all(s.removable for s in heads)
    assert isinstance(made.source.module, AsTraced)
    told = "where they are cut, zipc.load gives its traced graph"
    assert any(told in note for note in made.source.notes)


def test_where_no_head_is_cut_the_code_stays(
    made: Prepared, levels: Levels, tmp_path: Path
) -> None:
    widths = {n: s.units if s.kind == "heads" else s.units // 2 or 1 for n, s in made.sites.items()}
    allocation = Allocation({n: Level(w, DYNAMIC) for n, w in widths.items()}, 1.0, 0.0)
    document, tensors, module = checkpoint(made, allocation, levels.states(allocation))
    assert type(module).__name__ in ("Language", "Vision")
    (tmp_path / "structure.json").write_text(json.dumps(document))
    held = {n: t.contiguous().clone() for n, t in tensors.items()}
    save_file(held, tmp_path / "model.safetensors")
    assert type(zipc.load(tmp_path, factory=made.source.source)) is not AsTraced


@pytest.mark.parametrize("name", ["less", "rounded", "removed", "first-removed"])
def test_what_ships_and_what_is_loaded_are_what_was_simulated(
    made: Prepared, levels: Levels, name: str, tmp_path: Path
) -> None:
    allocation = allocations(made)[name]
    states = propagate(made.executor, levels, allocation, [made.example(batch=8, length=12)])
    build(made, allocation, states, workload=Request(model="m", sequence_length=16).workload)
    document, tensors, module = checkpoint(made, allocation, states)
    (tmp_path / "structure.json").write_text(json.dumps(document))
    held = {n: t.contiguous().clone() for n, t in tensors.items()}
    save_file(held, tmp_path / "model.safetensors")
    loaded = zipc.load(tmp_path, factory=made.source.source)
    example = made.example(batch=3, length=12)
    with torch.no_grad():
        found, expected = (made.source.chosen(m(**example)) for m in (loaded, module))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_dense_module_is_what_it_was(made: Prepared) -> None:
    """Inputs by place or by name, outputs in the containers of the user's code."""
    (feed,) = made.example(batch=3, length=12).values()
    module = made.source.module
    with torch.no_grad():
        found = module(feed)
    expected, _ = made.executor.run(made.example(batch=3, length=12), Variant())
    if isinstance(found, tuple):
        logits, rest = found
        assert set(rest) == {"states", "nothing"}
        assert rest["nothing"] is None
        found = logits
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)


def test_an_input_that_is_missing_is_named(made: Prepared) -> None:
    name = next(iter(made.example(batch=2, length=12)))
    with pytest.raises(TypeError, match=f"missing {name}$"):
        made.source.module()


def test_a_copy_of_it_is_trained_alone(made: Prepared) -> None:
    module = copy.deepcopy(made.source.module).requires_grad_(True)
    result = made.source.chosen(module(**made.example(batch=2, length=12)))[0]
    result.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad is None for p in made.source.module.parameters())


def test_other_values_of_a_tied_weight_leave_the_embedding(tmp_path: Path) -> None:
    made = prepared(tmp_path, "language")
    batches = [made.example(batch=8, length=12)]
    levels = plain_levels(made, batches)
    cut = next(s for s in made.structure.sites if s.kind == "heads")
    allocation = Allocation({"last": Level(1), cut.name: Level(1)}, 1.0, 0.0)
    states = propagate(made.executor, levels, allocation, batches)
    assert torch.equal(states.maps["last"].weight, made.weights["last.weight"])  # it is not fitted
    assert checkpoint(made, allocation, states)[0]["untied"] == []
    other = replace(states.maps["last"], weight=states.maps["last"].weight * 1.1)
    states.maps["last"] = other
    document, tensors, _ = checkpoint(made, allocation, states)
    assert document["untied"] == ["last"]
    assert not torch.equal(tensors["last.weight"], tensors["words.weight"])
    build(made, allocation, states, workload=Request(model="m", sequence_length=16).workload)


def test_a_module_whose_code_follows_stays_what_it_is(tmp_path: Path) -> None:
    made = prepared(tmp_path, "follows")
    assert type(made.source.module).__name__ == "Follows"
    assert made.sites
    assert not made.source.notes[1:]


def test_inspect_names_the_architecture_and_says_what_load_will_give(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(NETS)
    found = inspect_model(f"{file}:vision", input_shapes=[INPUTS["vision"]], measure=False)
    assert found["architecture"] == "Vision"
    assert [site["kind"] for site in found["sites"]].count("heads") == 2
    assert any("does not follow the width of" in note for note in found["notes"])
