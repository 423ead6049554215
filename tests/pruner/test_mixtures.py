"""Experts that no token is sent to any more: found, ordered by what that costs, or left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.three_ways import EXACT, gap, inert, prove_in_torch, random_sets, single_units
from tests.tiny_models import Case, everything, traced
from tests.zoo.values import randomise_
from zipc.pruner.experts import sweep_experts

COUNT, CHOSEN, WIDTH = 4, 2, 8
AXES = {"x": {0: "batch", 1: "sequence"}}
Step = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    return x


class Expert(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH, bias=bias)

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)) * share)


class Mixture(nn.Module):
    """Code of a user's own: a list of experts, and steps at which it may do something unusual."""

    def __init__(
        self,
        *,
        scores: Step = same,
        shares: Step = same,
        into: float = 0.0,
        bias: bool = False,
        own: bool = True,
        chosen: int = CHOSEN,
        twice: bool = False,
        largest: bool = True,
    ) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, COUNT)
        first = Expert(bias)
        self.experts = nn.ModuleList(first if not own else Expert(bias) for _ in range(COUNT))
        self.scores, self.shares, self.into, self.chosen = scores, shares, into, chosen
        self.twice, self.largest = twice, largest

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        scores = self.scores(self.router(tokens)).softmax(-1)
        best, index = scores.topk(self.chosen, dim=-1, largest=self.largest)
        shares = tokens.new_zeros(tokens.shape[0], len(self.experts))
        if self.into:
            shares = shares + self.into
        shares = self.shares(shares.scatter(1, index, best))
        total = x
        for number, expert in enumerate(self.experts):
            share = shares[:, number : number + 1]
            made = expert(tokens, share)
            total = total + (made + share if self.twice else made).view(x.shape)
        return total


def feeds(seed: int = 0, *, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)}


def case(module: nn.Module) -> Case:
    randomise_(module)
    module = module.double().eval().requires_grad_(False)
    return traced(module, feeds(), dynamic=AXES, outputs=None)


def test_experts_in_a_list_go_exactly() -> None:
    made = case(Mixture())
    site = next(s for s in made.sites if s.kind == "experts")
    assert (site.units, site.least, site.removable) == (COUNT, CHOSEN, False)
    dense = inert(made, everything(made), feeds())
    for name, _, kept in single_units(made):
        want = prove_in_torch(made, kept, feeds())
        assert name != site.name or gap(dense, want) > 1e-2
    for kept in random_sets(made, 6):
        prove_in_torch(made, kept, feeds(1, batch=3, length=4))


@pytest.mark.parametrize(
    "module",
    [
        Mixture(
            scores=torch.tanh
        ),  # of minus infinity is -1: an expert that is chosen all the same
        Mixture(scores=lambda s: s + s.mean(-1, keepdim=True)),
        Mixture(shares=lambda s: s / s.sum(-1, keepdim=True)),
        Mixture(shares=torch.exp),  # 1 where nothing was scattered
        Mixture(into=0.5),
        Mixture(bias=True),  # an expert adds something to the tokens of others
        Mixture(own=False),  # one expert under four names
        Mixture(chosen=COUNT),
        Mixture(twice=True),  # the share itself is added
        Mixture(largest=False),  # minus infinity is chosen first
    ],
    ids="tanh mean normalised exp background bias shared all twice smallest".split(),
)
def test_mixtures_that_do_something_else_keep_all_experts(module: nn.Module) -> None:
    made = case(module)
    assert "experts" not in {s.kind for s in made.sites}
    entry = next(a for a in made.structure.left_alone if a.path == "router")
    assert "output width is fixed" in entry.reason
    for kept in random_sets(made, 2):
        prove_in_torch(made, kept, feeds(1))


def test_experts_go_in_the_order_of_what_their_tokens_lose() -> None:
    made = case(Mixture())
    site = next(s for s in made.sites if s.kind == "experts")
    batches = [feeds(seed) for seed in range(3)]
    found = sweep_experts(made.executor, site, batches)

    def parts(kept: list[int]) -> Tensor:
        chosen = everything(made) | {site.name: kept}
        return torch.cat([inert(made, chosen, b)[0] - b["x"] for b in batches])

    dense = parts(list(range(COUNT)))
    left, errors = list(range(COUNT)), [0.0]
    for gone in found.order[: COUNT - CHOSEN]:
        error = {
            e: float((parts([k for k in left if k != e]) - dense).square().sum()) for e in left
        }
        assert gone == min(left, key=error.__getitem__)
        errors.append(error[gone] / float(dense.square().sum()))
        left.remove(gone)
    assert sorted(found.order) == list(range(COUNT))
    assert found.errors[: len(errors)] == pytest.approx(errors, abs=EXACT)
    assert found.errors[len(errors) :] == (1.0,) * CHOSEN
