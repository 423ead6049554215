"""Whatever a module does to its channels: a site is exact, or it is left alone with a reason."""

from __future__ import annotations

import operator
from collections.abc import Callable

import hypothesis.strategies as st
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tiny_models import (
    FAMILIES,
    Case,
    case,
    edit_of,
    everything,
    exported,
    first,
    random_kept,
    randomise_,
    sliced,
    surgered,
    traced,
    zeroed,
)
from zipc.exporters.specialise import specialise
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.graph.sites import find_sites

pytestmark = pytest.mark.xdist_group("encoders")
WIDTH = 16
IDS = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """Embedding -> first -> `middle` -> last, with some more maps for the middle to use."""

    def __init__(self, middle: Callable[[Plain, Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.narrow = nn.Linear(WIDTH // 2, 8)
        self.other = nn.Linear(8, WIDTH)
        self.last = nn.Linear(WIDTH, 8)
        self.wide = nn.Linear(2 * WIDTH, 8)
        self.end = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("saved", torch.ones(WIDTH))
        self.register_buffer("unsaved", torch.full((WIDTH,), 1.5), persistent=False)
        self.middle = middle

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.middle(self, self.norm(self.embed(input_ids)))


class Doubled(nn.Linear):
    """Looks like a linear map, and is not one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def plain(middle: Callable[[Plain, Tensor], Tensor | tuple[Tensor, ...]]) -> Case:
    module = Plain(middle)
    randomise_(module)
    module.get_buffer("saved").copy_(torch.linspace(0.5, 2, WIDTH))
    return traced(module.double().eval().requires_grad_(False), {"input_ids": IDS})


def prove(made: Case, *, seeds: int = 3) -> None:
    """Every unit of every site, whole sites and random sets: three ways to the same output."""
    trials = []
    for site in made.sites:
        for unit in range(site.units):
            trials.append(
                everything(made) | {site.name: [u for u in range(site.units) if u != unit]}
            )
        if site.removable:
            trials.append(everything(made) | {site.name: []})
    trials += [random_kept(made, seed) for seed in range(seeds)]
    feeds = {"input_ids": IDS.flip(0)[:, :4].repeat(2, 1)}
    for kept in trials:
        want = zeroed(made, kept, feeds)
        tensors, constants = sliced(made, kept)
        widths = {name: len(units) for name, units in kept.items()}
        variant = Variant(tensors=tensors, constants=constants, widths=widths)
        (run,), _ = made.executor.run(feeds, variant)
        for got in (run, first(surgered(made, kept)(**feeds))):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def prove_export(made: Case) -> None:
    """The exported and edited graph says the same in fp32."""
    module = made.module
    single = traced(module.float(), made.example)
    graph = exported(single, "y")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    trials = [random_kept(single, seed) for seed in range(3)]
    trials += [everything(single) | {s.name: []} for s in single.sites if s.removable]
    for kept in trials:
        session = ort.InferenceSession(specialise(graph, edit_of(single, kept)).to_bytes(), options)
        for ids in (IDS, IDS[:1, :1], IDS[:, :3].repeat(2, 1)):
            want = zeroed(single, kept, {"input_ids": ids})
            got = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# --- modules whose inner width can be pruned -----------------------------------------------------


def _gated(m: Plain, x: Tensor) -> Tensor:
    return m.end(x + m.last(F.silu(m.first(x)) * m.other(x)))


def _split_and_merged(m: Plain, x: Tensor) -> Tensor:
    h = m.first(x).view(*x.shape[:2], -1, 4).relu()
    return m.end(x + m.last(h.reshape(*x.shape[:2], -1)))


def _scaled(m: Plain, x: Tensor) -> Tensor:
    return m.end(x + m.last(m.first(x) * m.scale + m.saved))


def _two_readers(m: Plain, x: Tensor) -> Tensor:
    h = m.first(x).tanh()
    return m.end(x + m.last(h) + m.last(h.square()))


def _called_twice(m: Plain, x: Tensor) -> Tensor:
    for _ in range(2):
        x = m.end(x + m.last(F.gelu(m.first(x))))
    return x


def _parallel(m: Plain, x: Tensor) -> Tensor:
    first = m.last(F.gelu(m.first(x)))
    return m.end(first + m.narrow(m.other(x)[..., : WIDTH // 2]))


def _first_token(m: Plain, x: Tensor) -> Tensor:
    return m.last(torch.tanh(m.first(x[:, 0])))


def _mean_over_tokens(m: Plain, x: Tensor) -> Tensor:
    return m.last(m.first(x).relu().mean(1))


def _both_ranks(m: Plain, x: Tensor) -> Tensor:
    tokens = m.last(F.gelu(m.first(x)))
    pooled = m.last(F.gelu(m.first(x[:, 0])))
    return m.end(x + tokens) + pooled[:, None]


def _two_removable_terms(m: Plain, x: Tensor) -> Tensor:
    """Both terms of a sum may become constants; the sum still has the shape of the tokens."""
    return m.last(F.gelu(m.first(x))) + m.last(F.gelu(m.other(x)))


def _cat(m: Plain, x: Tensor) -> Tensor:
    return m.end(x + m.wide(torch.cat([m.first(x), m.other(x)], -1)))


def _chunked(m: Plain, x: Tensor) -> Tensor:
    h = m.first(x)
    left, right = h.chunk(2, -1)
    return m.end(m.last(h) + m.narrow(left * right))


def _flattened(m: Plain, x: Tensor) -> Tensor:
    return m.last(m.first(x).flatten(0, 1)).view(*x.shape)


PRUNABLE = [
    _gated,
    _split_and_merged,
    _scaled,
    _two_readers,
    _called_twice,
    _parallel,
    _first_token,
    _mean_over_tokens,
    _both_ranks,
    _two_removable_terms,
    _cat,
    _chunked,
    _flattened,
]


@pytest.mark.parametrize("middle", PRUNABLE)
def test_removal_is_exact_in_unusual_modules(middle: Callable[[Plain, Tensor], Tensor]) -> None:
    made = plain(middle)
    assert "first" in {p for s in made.sites for p in s.producers}
    prove(made)


@pytest.mark.parametrize("middle", PRUNABLE)
def test_export_is_exact_in_unusual_modules(middle: Callable[[Plain, Tensor], Tensor]) -> None:
    made = plain(middle)
    prove_export(made)


# --- modules whose inner width must be left alone, and the word that says why --------------------


def _returned(m: Plain, x: Tensor) -> tuple[Tensor, ...]:
    h = m.first(x)
    return h, m.last(h)


def _tied(m: Plain, x: Tensor) -> Tensor:
    return m.end(x + F.linear(m.first(x), m.first.weight.t()))


def _literal(m: Plain, x: Tensor) -> Tensor:
    return m.end(x + m.last(m.first(x) * torch.arange(WIDTH, dtype=x.dtype)))


LEFT = {
    "roll": (lambda m, x: m.end(x + m.last(m.first(x).roll(1, -1))), "roll runs along it"),
    "cumsum": (lambda m, x: m.end(x + m.last(m.first(x).cumsum(-1))), "cumsum runs along it"),
    "flip": (lambda m, x: m.end(x + m.last(m.first(x).flip(-1))), "flip runs along it"),
    "sort": (lambda m, x: m.end(x + m.last(m.first(x).sort(-1).values)), "op sort"),
    "softmax": (lambda m, x: m.end(x + m.last(m.first(x).softmax(-1))), "softmax"),
    "norm": (lambda m, x: m.last(F.layer_norm(m.first(x), (WIDTH,))), "normalisation"),
    "mean": (lambda m, x: m.last(m.first(x) - m.first(x).mean(-1, keepdim=True)), "reduced"),
    "slice": (lambda m, x: m.narrow(m.first(x)[..., : WIDTH // 2]), "sliced out"),
    "select": (lambda m, x: m.last(m.first(x)) * m.first(x)[..., :1], "sliced out"),
    "index": (lambda m, x: m.last(m.first(x)) * m.first(x)[..., 3, None], "selected"),
    "returned": (_returned, "output"),
    "computed weight": (_tied, "used by other operations"),
    "constant in code": (_literal, "created with a fixed size"),
    "unsaved buffer": (lambda m, x: m.last(m.first(x) * m.unsaved), "no checkpoint holds"),
    "product": (lambda m, x: m.last(m.first(x) @ m.second.weight), "belongs to a Plain"),
    "width in the code": (
        lambda m, x: m.last(m.first(x).view(-1, WIDTH)).view(*x.shape),
        "does not follow its width",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_mixes_channels_is_left_alone_with_a_reason(name: str) -> None:
    middle, reason = LEFT[name]
    made = plain(middle)
    prove(made, seeds=1)  # whatever else was found is exact
    assert all("first" not in s.producers for s in made.sites)
    entry = next(e for e in made.structure.left_alone if e.path == "first")
    assert reason in entry.reason


def test_a_reshape_that_swaps_the_factors_of_a_width_is_exact() -> None:
    """(4 x 4) is written and its transpose is read: units are strided in the reader."""

    def middle(m: Plain, x: Tensor) -> Tensor:
        h = m.first(x).view(*x.shape[:2], -1, 4).transpose(2, 3)
        return m.end(x + m.last(h.reshape(*x.shape[:2], -1)))

    made = plain(middle)
    prove(made)
    prove_export(made)
    assert len({s.name for s in made.sites}) == len(made.sites)


def test_a_width_read_in_two_groupings_is_exact_or_left_alone() -> None:
    def middle(m: Plain, x: Tensor) -> Tensor:
        h = m.first(x)
        pairs = h.view(*x.shape[:2], -1, 2).relu().reshape(h.shape)
        fours = h.view(*x.shape[:2], -1, 4).tanh().reshape(h.shape)
        return m.end(x + m.last(pairs + fours))

    made = plain(middle)
    prove(made)
    prove_export(made)


def test_a_subclass_of_linear_is_not_replaced() -> None:
    made = plain(lambda m, x: m.end(x + m.last(m.first(x).relu())))
    for path in ("first", "last"):
        module = Plain(lambda m, x: m.end(x + m.last(m.first(x).relu())))
        old = module.get_submodule(path)
        module.set_submodule(path, Doubled(old.in_features, old.out_features))
        randomise_(module)
        made = traced(module.double().eval().requires_grad_(False), {"input_ids": IDS})
        assert not made.sites
        assert any("Doubled" in e.reason for e in made.structure.left_alone)


def test_linears_with_tied_weights_are_left_alone() -> None:
    module = Plain(lambda m, x: m.end(x + m.last(m.first(x).relu()) + m.last(m.other(x))))
    module.other.weight = module.first.weight
    made = traced(module.double().eval().requires_grad_(False), {"input_ids": IDS})
    prove(made)
    assert not made.sites
    assert any("tied" in e.reason for e in made.structure.left_alone)


def test_one_module_under_two_names_is_left_alone() -> None:
    module = Plain(lambda m, x: m.end(x + m.last(m.first(x).relu()) + m.last(m.other(x))))
    module.other = module.first
    made = traced(module.double().eval().requires_grad_(False), {"input_ids": IDS})
    prove(made)
    assert not made.sites


def test_chained_widths_are_two_sites_that_cut_one_map() -> None:
    made = plain(lambda m, x: m.end(x + m.last(m.second(m.first(x).relu()).relu())))
    prove(made)
    prove_export(made)
    assert [s.name for s in made.sites] == ["first", "second"]
    cut = [(p.parameter, p.dim, s.name) for s in made.sites for p in s.slices]
    assert {c for c in cut if c[0] == "second.weight"} == {
        ("second.weight", 1, "first"),
        ("second.weight", 0, "second"),
    }
    assert len({c[:2] for c in cut}) == len(cut)


def test_a_width_that_no_asked_for_output_reads_is_left_alone() -> None:
    made = plain(lambda m, x: (m.last(m.first(x)), m.last(m.other(x))))
    assert {p for s in made.sites for p in s.producers} <= {"first", "other"}
    prove(made)
    dead = plain(lambda m, x: (m.end(x), m.last(m.other(x).relu())))
    assert not dead.sites
    assert any("does not reach" in e.reason for e in dead.structure.left_alone)


def test_include_and_exclude_name_sites() -> None:
    made = case("bert")
    names = [s.name for s in made.sites]
    program = made.program
    assert [s.name for s in find_sites(program, include=["*layer.1*"]).sites] == names[2:]
    without = find_sites(program, exclude=["*attention*"])
    assert [s.name for s in without.sites] == names[1::2]
    assert {e.path for e in without.left_alone} >= set(names[0::2])
    assert find_sites(program, include=["nothing"]).sites == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_output_of_a_linear_is_a_site_or_left_alone_with_a_reason(family: str) -> None:
    made = case(family)
    inside = {m for s in made.sites for m in s.producers}
    outside = {e.path: e.reason for e in made.structure.left_alone}
    for call in made.program.maps:
        assert (call.module in inside) != (call.module in outside)
    inside |= {p.parameter.rpartition(".")[0] for s in made.sites for p in s.slices}
    traced = {name for name, _ in made.program.tensors.values()}
    for name, value in made.module.named_parameters():
        held = name.rpartition(".")[0] in inside | set(outside)
        assert value.dim() < 2 or held or name not in traced, name
    assert all(outside.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_encoders_are_their_heads_and_inner_widths(family: str) -> None:
    made = case(family)
    kinds = [s.kind for s in made.sites]
    layers = 1 if family == "albert" else 2
    assert kinds.count("heads") == (1 if family == "mpnet" else layers)
    assert kinds.count("ffn") == layers + ("classifier" in family)
    assert all(s.units == 4 for s in made.sites if s.kind == "heads")
    assert all(s.calls == (2 if family == "albert" else 1) for s in made.sites)


def test_equal_layers_have_equal_signatures_and_different_ones_do_not() -> None:
    signatures = [s.signature for s in case("bert").sites]
    assert signatures[:2] == signatures[2:]
    assert signatures[0] != signatures[1]
    assert signatures[1] != case("bert-square").sites[1].signature


# --- random residual graphs ----------------------------------------------------------------------

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [F.gelu, torch.relu, torch.tanh, operator.neg]
STEPS = ["ffn", "gated", "shared", "mixed", "normed", "chained", "plain"]


class Random(nn.Module):
    """A stack of steps; each keeps, reuses, gates or mixes an inner width."""

    def __init__(self, steps: list[tuple[str, int, int]], *, norms: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.steps = steps
        self.up = nn.ModuleList(nn.Linear(8, w) for _, w, _ in steps)
        self.gate = nn.ModuleList(nn.Linear(8, w, bias=False) for _, w, _ in steps)
        self.inner = nn.ModuleList(nn.Linear(w, w) for _, w, _ in steps)
        self.down = nn.ModuleList(nn.Linear(w, 8) for _, w, _ in steps)
        self.norms = nn.ModuleList(nn.LayerNorm(8) if norms else nn.Identity() for _ in steps)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for i, (step, _, which) in enumerate(self.steps):
            act = ACTIVATIONS[which]
            h = self.up[i](x)
            if step == "gated":
                h = act(h) * self.gate[i](x)
            elif step == "shared":
                h = act(h) + act(self.up[i](x * 0.5))
            elif step == "mixed":
                h = act(h).roll(1, -1)
            elif step == "normed":
                h = h.softmax(-1)
            elif step == "chained":
                h = self.inner[i](act(h))
            elif step == "ffn":
                h = act(h)
            x = self.norms[i](x + self.down[i](h))
        return self.head(x)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(2, 6), st.integers(0, 3)),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_random_residual_graphs_are_exact(steps: list[tuple[str, int, int]], norms: bool) -> None:
    module = Random(steps, norms=norms)
    randomise_(module)
    made = traced(module.double().eval().requires_grad_(False), {"input_ids": IDS})
    prove(made)
    free = {i for i, (step, _, _) in enumerate(steps) if step not in ("mixed", "normed")}
    found = {p for s in made.sites for p in s.producers}
    if norms:
        assert {f"up.{i}" for i in free} <= found
    for i in set(range(len(steps))) - free:
        assert f"up.{i}" not in found
