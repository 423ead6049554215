"""Starting in the middle of the model gives the loss of a whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny_models import Case, case, text
from zipc.core.types import Allocation, Level
from zipc.numerics.int8 import DYNAMIC, STATIC
from zipc.pruner.allocate.scorer import Scorer
from zipc.pruner.evidence import collect
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.ladder import sweep_site
from zipc.pruner.levels import Levels

pytestmark = pytest.mark.xdist_group("encoders")
NUMERICS = ("fp32", DYNAMIC, STATIC)


def levels_of(made: Case, family: str) -> Levels:
    batches = [text(family, batch=6, length=9, seed=s) for s in range(3)]
    modules = [m for s in made.sites for m in s.maps]
    stats = collect(made.executor, batches, modules=modules)
    sweeps = {s.name: sweep_site(s, made.weights, stats, made.calls) for s in made.sites}
    sites = {s.name: s for s in made.sites}
    return Levels(sites, made.calls, made.weights, stats, sweeps)


def readout(outputs: Sequence[Tensor], feeds: Mapping[str, Tensor]) -> Tensor:
    return outputs[0].flatten(1)[:, :96]


def make(made: Case, levels: Levels, family: str) -> Scorer:
    return Scorer(
        made.executor,
        levels,
        [text(family, batch=3, length=n, seed=n) for n in (7, 9)],
        readout=readout,
        oracle=lambda dense, candidate: float(((dense - candidate) ** 2).mean()),
    )


def random_allocation(made: Case, rng: np.random.Generator) -> Allocation:
    levels = {}
    for site in made.sites:
        width = int(rng.integers(0, site.units + 1))
        levels[site.name] = Level(width, str(rng.choice(NUMERICS))) if width else Level(0)
    return Allocation(levels, 0.0, 0.0)


def changed(a: Allocation, made: Case, rng: np.random.Generator) -> Allocation:
    """`a` with one or two sites as in another random allocation."""
    other = random_allocation(made, rng).levels
    picked = rng.choice([s.name for s in made.sites], rng.integers(1, 3), replace=False)
    return Allocation(dict(a.levels) | {str(n): other[str(n)] for n in picked}, 0.0, 0.0)


@pytest.mark.parametrize("family", ["bert", "distilbert-classifier", "albert", "mpnet"])
def test_cached_prefixes_change_no_loss(family: str) -> None:
    made = case(family)
    levels = levels_of(made, family)
    cached = make(made, levels, family)
    rng = np.random.default_rng(0)
    base = random_allocation(made, rng)
    for turn in range(24):
        candidate = changed(base, made, rng) if turn % 6 else random_allocation(made, rng)
        keep = bool(rng.random() < 0.4)
        if turn == 15:
            cached.rebase_on_dense()
        whole = make(made, levels, family)  # has no prefix: runs everything
        loss = cached.score(candidate, keep=keep)
        assert loss == pytest.approx(whole.score(candidate), rel=1e-5, abs=1e-12)
        assert cached.score(candidate) == loss
        if keep:
            base = candidate


def test_dense_levels_cost_nothing_and_nothing_is_scored_twice() -> None:
    made = case("bert")
    scorer = make(made, levels_of(made, "bert"), "bert")
    dense = Allocation({s.name: Level(s.units) for s in made.sites}, 0.0, 0.0)
    assert scorer.score(dense) < 1e-10
    assert scorer.score(Allocation({}, 0.0, 0.0)) < 1e-10
    count = scorer.evaluations
    scorer.score(dense)
    assert scorer.evaluations == count


def test_loss_is_that_of_the_variant_run_by_hand() -> None:
    made = case("bert")
    levels = levels_of(made, "bert")
    scorer = make(made, levels, "bert")
    allocation = random_allocation(made, np.random.default_rng(2))
    dense: list[Tensor] = []
    outputs: list[Tensor] = []
    for n in (7, 9):
        feeds = text("bert", batch=3, length=n, seed=n)
        for variant, held in ((Variant(), dense), (levels.variant(allocation), outputs)):
            result, _ = made.executor.run(feeds, variant)
            held.append(readout(result, feeds))
    expected = float(((torch.cat(dense) - torch.cat(outputs)) ** 2).mean())
    assert scorer.score(allocation) == pytest.approx(expected, rel=1e-5)
