"""The zoo itself: every graph runs, repeats itself, can be traced, and has nothing idle in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from tests.three_ways import double
from tests.zoo import LONGEST, ZOO, Family
from tests.zoo.adversarial import ADVERSARIES, SOLVABLE, WIDTH
from tests.zoo.random_graphs import KINDS, Step, family, graphs
from tests.zoo.vision import CifarResNet
from zipc.core.quiet import hush

EVERYTHING = {**ZOO, **ADVERSARIES}
pytestmark = pytest.mark.xdist_group("zoo")
everything = pytest.mark.parametrize("name", EVERYTHING)
families = pytest.mark.parametrize("name", ZOO)

# Softmax does not see what is added to all keys alike.
UNSEEN = ("key.bias", "k_lin.bias", "attn.k.bias", "k_proj.bias", "c_attn.bias", "in_proj_bias")
# Tables of which so short an example looks up a few rows.
LOOKED_UP = (
    "embeddings.weight",
    "embed_tokens.weight",
    "embed_positions.weight",
    "wpe.weight",
    "attention_bias.weight",
)
# Readers of single positions of a unit, which may be zero in both images of the example.
POSITIONS = {
    "vgg": "classifier.0.weight",
    "wrong-flatten": "head.weight",
    "many-readers": "all.weight",
}
# Units of the first convolution that the graph itself never reads.
NEVER_READ = {
    "first-half": 4,
    "every-second": 4,
    "permuted": 1,
    "writes-into-slice": 2,
}


def outputs(module: nn.Module, feeds: dict[str, Tensor]) -> list[Tensor]:
    return [v for v in tree_leaves(module(**feeds)) if isinstance(v, Tensor)]


def in_float64(made: Family) -> tuple[nn.Module, dict[str, Tensor]]:
    return made.build().double(), doubled(made.example())


def doubled(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in feeds.items()}


def exported(made: Family) -> torch.export.ExportedProgram:
    module, feeds = in_float64(made)
    with torch.no_grad(), hush():
        return torch.export.export(
            module, (), kwargs=feeds, dynamic_shapes=made.shapes(), strict=False
        )


def program(name: str) -> torch.export.ExportedProgram:
    return double(name).program.exported


def of_other_sizes(made: Family) -> list[dict[str, Tensor]]:
    if made.modality == "text":
        return [made.example(batch=b, length=n, seed=1) for b, n in ((1, 5), (3, LONGEST))]
    return [made.example(batch=b, seed=1) for b in (1, 3)]


@everything
def test_building_and_running_twice_gives_the_same(name: str) -> None:
    made = EVERYTHING[name]
    one, two = made.build(), made.build()
    state = two.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())
    assert not any(module.training for module in one.modules())
    assert not any(parameter.requires_grad for parameter in one.parameters())
    for a, b in zip(outputs(one, made.example()), outputs(two, made.example()), strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()
    other = outputs(one, made.example(seed=1))
    assert not torch.equal(other[0], outputs(one, made.example())[0])


@everything
def test_the_trace_equals_the_module_at_sizes_it_was_not_made_at(name: str) -> None:
    made = EVERYTHING[name]
    module, feeds = in_float64(made)
    traced = program(name).module()
    for these in (feeds, *map(doubled, of_other_sizes(made))):
        for a, b in zip(outputs(traced, these), outputs(module, these), strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@families
def test_activations_stay_near_one(name: str) -> None:
    made = ZOO[name]
    module = made.build()
    largest: dict[str, float] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                largest[path] = max(largest.get(path, 0.0), float(out.abs().max()))

        return hook

    for path, child in module.named_modules():
        if next(child.children(), None) is None:
            child.register_forward_hook(note(path))
    outputs(module, made.example())
    assert largest
    assert {path: value for path, value in largest.items() if not 0.05 < value < 20} == {}


@everything
def test_no_unit_is_idle(name: str) -> None:
    """A gradient reaches every row and column of every parameter."""
    module, feeds = in_float64(EVERYTHING[name])
    module.requires_grad_(True)
    generator = torch.Generator().manual_seed(5)
    out = outputs(module, feeds)[0]
    (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum().backward()
    idle = {}
    for key, parameter in module.named_parameters():
        if key.endswith(UNSEEN):
            continue
        assert parameter.grad is not None, key
        moved = parameter.grad.abs() > 1e-9
        first = 1 if key.endswith(LOOKED_UP) else 0
        last = 1 if key == POSITIONS.get(name) else 2
        for axis in range(first, min(last, moved.dim())):
            dead = int((~moved.transpose(0, axis).reshape(moved.shape[axis], -1).any(1)).sum())
            if dead:
                idle[f"{key}, axis {axis}"] = dead
    never = NEVER_READ.get(name, 0)
    assert idle == ({f"conv1.{n}, axis 0": never for n in ("weight", "bias")} if never else {})


@everything
def test_running_statistics_matter(name: str) -> None:
    made = EVERYTHING[name]
    module, feeds = in_float64(made)
    want = outputs(module, feeds)[0]
    for path, norm in module.named_modules():
        if isinstance(norm, _NormBase) and norm.running_mean is not None:
            assert norm.running_var is not None
            assert 1.0 <= float(norm.running_var.min()) <= float(norm.running_var.max()) <= 2.0
            for buffer in (norm.running_mean, norm.running_var):
                held = buffer.clone()
                buffer.mul_(1.5)
                assert not torch.allclose(outputs(module, feeds)[0], want, atol=1e-6), path
                buffer.copy_(held)


@families
def test_float64_says_whether_activations_are_rounded_to_float32(name: str) -> None:
    signature = program(name).graph_signature
    reached = set()  # nodes that depend on a parameter or on an input of real numbers
    rounded = []
    for node in program(name).graph.nodes:
        value = node.meta.get("val")
        real = isinstance(value, Tensor) and value.is_floating_point()
        if node.op == "placeholder":
            of_user = node.name in signature.user_inputs and real
            if of_user or node.name in signature.inputs_to_parameters:
                reached.add(node)
        elif reached & set(node.all_input_nodes):
            reached.add(node)
            if real and value.dtype != torch.float64:
                rounded.append(node.name)
    assert ZOO[name].float64 == (not rounded)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_cifar_resnet_has_the_published_size_and_names(depth: int, parameters: int) -> None:
    module = CifarResNet(depth, width=16)
    assert sum(p.numel() for p in module.parameters()) == parameters
    state = module.state_dict()
    last = (depth - 2) // 6 - 1
    norm = {f"layer3.{last}.bn2.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    assert norm | {"conv1.weight", "bn1.bias", "linear.weight", "linear.bias"} <= state.keys()
    assert state["layer2.0.conv1.weight"].shape == (32, 16, 3, 3)
    assert not any("shortcut" in key for key in state)


@pytest.mark.parametrize(
    "name",
    (
        "rolled flipped gated-by-first writes-into-slice channel-softmax channel-cumsum "
        "channel-mean channel-sort channel-attention width-as-number"
    ).split(),
)
def test_cutting_the_same_index_on_both_sides_is_silently_wrong(name: str) -> None:
    """Unit i leaves the first convolution, column i the second, and nothing complains."""
    made = ADVERSARIES[name]
    feeds = doubled(made.example())
    wrong = 0.0
    for unit in range(WIDTH):
        kept = [u for u in range(WIDTH) if u != unit]
        zeroed, cut = made.build().double(), made.build().double()
        for held in (zeroed.conv1.weight, zeroed.conv1.bias):
            held[unit] = 0.0
        cut.conv1.weight = nn.Parameter(cut.conv1.weight[kept], requires_grad=False)
        cut.conv1.bias = nn.Parameter(cut.conv1.bias[kept], requires_grad=False)
        cut.conv2.weight = nn.Parameter(cut.conv2.weight[:, kept], requires_grad=False)
        wrong = max(wrong, float((cut(**feeds) - zeroed(**feeds)).abs().max()))
    assert wrong > 1e-3


def test_what_is_called_solvable_exists() -> None:
    assert set(ADVERSARIES) >= SOLVABLE


@given(graphs())
@settings(max_examples=15, deadline=None)
def test_random_graphs_trace_at_any_batch(made: Family) -> None:
    module, other = made.build().double(), doubled(made.example(batch=3, seed=1))
    want = module(**other)
    assert torch.isfinite(want).all()
    got = exported(made).module()(**other)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_random_graphs_are_the_same_when_built_again(made: Family) -> None:
    feeds = made.example()
    assert torch.equal(made.build()(**feeds), made.build()(**feeds))
    assert float(made.build()(**feeds).abs().max()) < 1e3


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step_does_what_it_is_called(kind: str) -> None:
    """At channels where nothing stands against it, so that it is no convolution in disguise."""
    made = family(Step("conv", width=6), Step(kind, other=1, width=4))
    module = made.build()
    nodes = {str(n.target) for n in exported(made).graph.nodes}
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    groups = sorted({m.groups for m in convolutions})
    expected = {
        "conv": len(convolutions) == 3,
        "add": "aten.add.Tensor" in nodes,
        "cat": "aten.cat.default" in nodes,
        "split": any("split" in n or "chunk" in n for n in nodes),
        "grouped": groups == [1, 2],
        "depthwise": groups == [1, 6],
        "norm": "aten.silu.default" in nodes,
        "pool": any("pool2d" in n for n in nodes),
        "squeeze-excite": "aten.hardsigmoid.default" in nodes,
        "multiply": "aten.sigmoid.default" in nodes,
    }
    assert expected[kind]
