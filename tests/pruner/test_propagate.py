"""Repairing sites in order is least squares on what reaches them, and never hurts where it fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tiny_models import Case, case, randomise_, text, traced
from zipc.core.types import Allocation, Level, Site
from zipc.numerics.int8 import DYNAMIC, STATIC
from zipc.pruner.compensate.propagate import _Moments, propagate
from zipc.pruner.evidence import collect
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.ladder import sweep_site
from zipc.pruner.levels import Levels
from zipc.pruner.states import MapState, variant_of

pytestmark = pytest.mark.xdist_group("encoders")
RIDGE = 0.03


class Toy(nn.Module):
    """Two residual blocks on embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.up = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.gelu(up(x)))
        return x


def maps_of(site: Site) -> list[str]:
    return set(site.maps)


def batches(family: str = "bert", count: int = 4) -> list[dict[str, Tensor]]:
    return [text(family, batch=6, length=11, seed=s) for s in range(count)]


def levels_of(made: Case, data: list[dict[str, Tensor]]) -> Levels:
    modules = [m for s in made.sites for m in maps_of(s)]
    stats = collect(made.executor, data, modules=modules)
    sweeps = {s.name: sweep_site(s, made.weights, stats, made.calls) for s in made.sites}
    sites = {s.name: s for s in made.sites}
    return Levels(sites, made.calls, made.weights, stats, sweeps)


def ridge_by_rows(x: np.ndarray, error: np.ndarray, base: MapState) -> tuple[Tensor, Tensor]:
    """Weight and bias that explain `error` (rows, out) from x (rows, in), by plain least squares.

    The penalty on the change of weight is written as extra rows.
    """
    rest = error - (x @ base.weight.double().numpy().T + base.bias.double().numpy())
    centred, middle = x - x.mean(0), rest - rest.mean(0)
    scale = np.sqrt(RIDGE * (centred**2).sum() / x.shape[1])
    stacked = np.concatenate([centred, scale * np.eye(x.shape[1])])
    target = np.concatenate([middle, np.zeros((x.shape[1], rest.shape[1]))])
    change = np.linalg.lstsq(stacked, target, rcond=None)[0].T
    shift = rest.mean(0) - change @ x.mean(0)
    return base.weight.double() + torch.from_numpy(change), base.bias.double() + torch.from_numpy(
        shift
    )


def test_repair_is_the_closed_form_of_least_squares_on_two_blocks() -> None:
    module = Toy().eval().requires_grad_(False)
    randomise_(module)
    data = batches()
    made = traced(module, {"input_ids": data[0]["input_ids"]})
    levels = levels_of(made, data)
    first, second = made.sites
    allocation = Allocation({first.name: Level(5), second.name: Level(7)}, 0.0, 0.0)
    states = propagate(made.executor, levels, allocation, data, ridge=RIDGE)

    ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in data])
    dense = small = module.double().embed(ids)
    for i in range(2):
        dense = dense + module.down[i](F.gelu(module.up[i](dense)))
        base = levels.states(allocation).maps
        up = base[f"up.{i}"]
        hidden = F.gelu(F.linear(small, up.weight.double(), up.bias.double()))
        weight, bias = ridge_by_rows(hidden.numpy(), (dense - small).numpy(), base[f"down.{i}"])
        fitted = states.maps[f"down.{i}"]
        torch.testing.assert_close(fitted.weight.double(), weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fitted.bias.double(), bias, rtol=1e-3, atol=1e-4)
        small = small + F.linear(hidden, weight, bias)


def test_removed_site_leaves_the_mean_of_what_is_missing() -> None:
    module = Toy().eval().requires_grad_(False)
    randomise_(module)
    data = batches()
    made = traced(module, {"input_ids": data[0]["input_ids"]})
    levels = levels_of(made, data)
    first, second = made.sites
    allocation = Allocation({first.name: Level(0), second.name: Level(0)}, 0.0, 0.0)
    states = propagate(made.executor, levels, allocation, data)
    ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in data])
    start = module.embed(ids)
    middle = start + module.down[0](F.gelu(module.up[0](start)))
    end = middle + module.down[1](F.gelu(module.up[1](middle)))
    lost = (middle - start).mean(0)
    torch.testing.assert_close(states.constants["down.0"], lost, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        states.constants["down.1"],
        (end - start - lost).mean(0),
        rtol=1e-4,
        atol=1e-5,
    )


def output_error(made: Case, variant: Variant, data: list[dict[str, Tensor]]) -> float:
    total = 0.0
    for feeds in data:
        dense, _ = made.executor.run(feeds, Variant())
        small, _ = made.executor.run(feeds, variant)
        gap = dense[0] - small[0]
        rows = gap[feeds["attention_mask"].bool()] if gap.dim() == 3 else gap
        total += float((rows**2).sum())
    return total


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "xlm-roberta"])
@pytest.mark.parametrize("numeric", ["fp32", DYNAMIC, STATIC])
@pytest.mark.parametrize("share", [0.34, 0.67])
def test_repaired_model_is_nearer_to_the_dense_one(family: str, numeric: str, share: float) -> None:
    made, data = case(family), batches(family)
    levels = levels_of(made, data)
    picked = {s.name: Level(round(share * s.units), numeric) for s in made.sites}
    allocation = Allocation(picked, 0.0, 0.0)
    plain = output_error(made, levels.variant(allocation), data)
    states = propagate(made.executor, levels, allocation, data)
    repaired = output_error(made, variant_of(allocation, states), data)
    assert repaired < plain


@pytest.mark.parametrize("family", ["bert", "distilbert-classifier", "albert"])
def test_dense_allocation_is_left_as_it_is(family: str) -> None:
    made, data = case(family), batches(family, 2)
    allocation = Allocation({s.name: Level(s.units) for s in made.sites}, 0.0, 0.0)
    states = propagate(made.executor, levels_of(made, data), allocation, data)
    assert set(states.maps) == {m for s in made.sites for m in maps_of(s)}
    for module, held in states.maps.items():
        torch.testing.assert_close(
            held.weight, made.weights[module + ".weight"], rtol=1e-3, atol=1e-4
        )


def test_sites_are_repaired_in_the_order_they_run() -> None:
    made, data = case("bert"), batches("bert", 1)
    backwards = {s.name: Level(1) for s in reversed(made.sites)}
    told: list[str] = []
    propagate(
        made.executor,
        levels_of(made, data),
        Allocation(backwards, 0.0, 0.0),
        data,
        on_site=told.append,
    )
    assert told == [s.name for s in sorted(made.sites, key=made.executor.first_effect)]


def test_shared_modules_keep_the_weights_of_their_ladder() -> None:
    made, data = case("albert"), batches("albert", 2)
    levels = levels_of(made, data)
    allocation = Allocation({s.name: Level(2) for s in made.sites}, 0.0, 0.0)
    states = propagate(made.executor, levels, allocation, data)
    expected = levels.states(allocation, feedback=True)
    assert all(site.calls == 2 for site in made.sites)
    assert set(states.maps) == {m for s in made.sites for m in maps_of(s)}
    assert all(states.maps[m] is expected.maps[m] for m in states.maps)


def test_moments_that_rounding_left_indefinite_are_repaired_too() -> None:
    # As of inputs that hardly vary: what is left of large sums after their mean is taken out.
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    moments = _Moments.of(x, torch.ones(2, 3))
    moments.gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    change, shift = moments.correction(1e-1)
    assert bool(torch.isfinite(change).all())
    assert bool(torch.isfinite(shift).all())
