"""A structure document says all there is to say about the shape of a module."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import (
    FAMILIES,
    Case,
    build,
    case,
    everything,
    first,
    random_kept,
    surgered,
    text,
    traced,
)
from zipc.core.errors import CorruptFile
from zipc.numerics.int8 import DYNAMIC, STATIC, Int8Linear
from zipc.pruner.graph import surgery

pytestmark = pytest.mark.xdist_group("encoders")
families = pytest.mark.parametrize("family", FAMILIES)


def document(family: str, seed: int, numerics: dict[str, str] | None = None) -> dict[str, Any]:
    made = case(family)
    widths = {n: len(k) for n, k in random_kept(made, seed).items()}
    return described(made, widths, numerics)


def described(
    made: Case, widths: dict[str, int], numerics: dict[str, str] | None = None
) -> dict[str, Any]:
    return surgery.describe(
        made.module, made.program, made.structure, widths=widths, numerics=numerics
    )


@families
@pytest.mark.parametrize("seed", range(3))
def test_a_fresh_module_takes_structure_and_state_through_json(family: str, seed: int) -> None:
    made = case(family)
    pruned = surgered(made, random_kept(made, seed))
    written = json.loads(json.dumps(document(family, seed)))
    fresh = build(family)
    surgery.apply_structure_(fresh, written)
    fresh.load_state_dict(pruned.state_dict(), strict=True)
    feeds = text(family, batch=3, length=10)
    assert torch.equal(first(fresh.eval()(**feeds)), first(pruned(**feeds)))


@families
def test_structure_holds_shapes_only_where_something_changed(family: str) -> None:
    made = case(family)
    widths = {s.name: s.units for s in made.sites}
    whole = described(made, widths)
    again = copy.deepcopy(made.module)
    surgery.apply_structure_(again, whole)
    shapes = {n: t.shape for n, t in again.state_dict().items()}
    assert shapes == {n: t.shape for n, t in made.module.state_dict().items()}
    assert not whole["stubs"]
    assert not whole["tensors"]
    assert not whole["numerics"]


@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC])
def test_numerics_come_back_as_integer_linears(numeric: str) -> None:
    made = case("bert")
    site = made.sites[1]
    paths = site.maps
    kept = everything(made) | {site.name: [1, 4, 5]}
    widths = {n: len(k) for n, k in kept.items()}
    numerics = dict.fromkeys(paths, numeric)
    written = json.loads(json.dumps(described(made, widths, numerics)))
    module, other = build("bert"), build("bert")
    surgery.apply_structure_(module, written)
    surgery.apply_structure_(other, written)
    generator = torch.Generator().manual_seed(0)
    for path in paths:
        linear = module.get_submodule(path)
        assert isinstance(linear, Int8Linear)
        linear.weight.random_(-127, 128, generator=generator)
        linear.weight_scale.fill_(0.003)
        if numeric == STATIC:
            linear.input_scale.fill_(0.02)
            linear.input_zero_point.fill_(100)
    other.load_state_dict(module.state_dict(), strict=True)
    feeds = text("bert")
    with torch.no_grad():
        assert torch.equal(first(other(**feeds)), first(module(**feeds)))


@families
def test_modules_remember_their_new_number_of_heads(family: str) -> None:
    made = case(family)
    kept = everything(made)
    for site in made.inner:
        if site.kind == "heads":
            kept[site.name] = [0, 2, 3]
    pruned = surgered(made, kept)
    found = 0
    for site in made.inner:
        for path in {p.rpartition(".")[0] for p in site.producers}:
            old, new = made.module.get_submodule(path), pruned.get_submodule(path)
            for name in surgery.UNIT_COUNTS:
                if hasattr(old, name):
                    assert getattr(old, name) == 4
                    assert getattr(new, name) == (3 if site.kind == "heads" else 4)
                    found += 1
            if site.kind == "ffn":
                assert {k: v for k, v in vars(new).items() if type(v) is int} == {
                    k: v for k, v in vars(old).items() if type(v) is int
                }
    assert found


def test_a_wrong_schema_is_a_corrupt_file() -> None:
    for schema in (0, surgery.SCHEMA_VERSION + 1, None, "1"):
        written = document("bert", 0) | {"schema_version": schema}
        with pytest.raises(CorruptFile, match="schema"):
            surgery.apply_structure_(build("bert"), written)


PATH = "encoder.layer.0.intermediate.dense"
BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown module": lambda d: d["tensors"].update({"encoder.nowhere.dense.weight": [3, 3]}),
    "unknown stub": lambda d: d["stubs"].update(
        {"encoder.layer.9.dense": {"kind": "constant", "features": 3, "window": []}}
    ),
    "unknown tensor": lambda d: d["tensors"].update({"encoder.relative.weight": [3, 3]}),
    "unknown owner of an attribute": lambda d: d["attributes"].update(
        {"encoder.layer.7": {"num_attention_heads": 3}}
    ),
    "unknown attribute": lambda d: d["attributes"].update({PATH: {"in_futures": 3}}),
    "attribute that is no number": lambda d: d["attributes"].update({PATH: {"__class__": 3}}),
    "attribute is a word": lambda d: d["attributes"].update({PATH: {"in_features": "wide"}}),
    "missing part": lambda d: d.pop("tensors"),
    "missing size": lambda d: d["stubs"].update({PATH: {"kind": "constant", "window": []}}),
    "missing kind": lambda d: d["stubs"].update({PATH: {"features": 3, "window": []}}),
    "size is a word": lambda d: d["tensors"].update({PATH + ".weight": ["wide", 32]}),
    "size is negative": lambda d: d["tensors"].update({PATH + ".weight": [-4, 32]}),
    "shape is a number": lambda d: d["tensors"].update({PATH + ".weight": 4}),
    "part is a list": lambda d: d.update({"tensors": [1, 2]}),
    "unknown numeric": lambda d: d["numerics"].update({PATH: "int3"}),
    "numeric of nothing": lambda d: d["numerics"].update({"encoder.nowhere": DYNAMIC}),
    "numeric of a whole layer": lambda d: d["numerics"].update({"encoder.layer.0": DYNAMIC}),
    "bias of nothing": lambda d: d["biased"].append("encoder.nowhere"),
    "unknown kind of stub": lambda d: d["stubs"].update(
        {PATH: {"kind": "surprise", "features": 3, "window": []}}
    ),
    "drops nothing that is there": lambda d: d["dropped"].append("encoder.layer.9"),
    "no module at all": lambda d: d["tensors"].update({"": [3, 3]}),
}


@pytest.mark.parametrize("change", BROKEN)
def test_an_edited_document_is_a_corrupt_file(change: str) -> None:
    written = copy.deepcopy(document("mpnet", 2))
    surgery.apply_structure_(build("mpnet"), written)  # fits before it is edited
    BROKEN[change](written)
    with pytest.raises(CorruptFile):
        surgery.apply_structure_(build("mpnet"), written)


def test_a_document_of_another_architecture_is_a_corrupt_file() -> None:
    with pytest.raises(CorruptFile, match="does not fit"):
        surgery.apply_structure_(build("distilbert"), document("bert", 0))


def test_stubs_keep_shapes_and_gradients_out() -> None:
    constant, empty = surgery.ConstantMap(4), surgery.EmptyMap(6)
    constant.bias.data = torch.arange(4.0)
    x = torch.randn(2, 3, 9)
    assert torch.equal(constant(x), torch.arange(4.0).expand(2, 3, 4))
    assert torch.equal(empty(x), torch.zeros(2, 3, 6))


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((9,), {"kernel_size": 3, "stride": 2}),
        ((9, 7), {"kernel_size": (3, 1), "stride": (2, 1), "padding": (0, 2)}),
        ((9, 8), {"kernel_size": 2, "dilation": 3, "padding": 1}),
        ((5, 6, 7), {"kernel_size": 3, "padding": 1, "stride": 2}),
    ],
)
def test_stubs_of_convolutions_give_every_position_a_value(
    size: tuple[int, ...], options: dict[str, Any]
) -> None:
    """What a convolution gives whose weights are zero, and its bias."""
    kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(size) - 1]
    conv = kind(3, 4, **options)
    conv.weight.data.zero_()
    x = torch.randn(2, 3, *size)
    window = list(zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True))
    constant, empty = surgery.ConstantMap(4, window), surgery.EmptyMap(4, window)
    constant.bias.data = conv.bias.data
    assert torch.equal(constant(x), conv(x))
    assert torch.equal(empty(x), conv(x) * 0)


def test_maps_that_get_a_bias_have_a_zero_one() -> None:
    made = case("bert")
    bare, path = build("bert"), "encoder.layer.0.output.dense"
    bare.get_submodule(path).bias = None
    bare = traced(bare, made.example).module
    widths = {s.name: s.units for s in made.sites}
    written = json.loads(
        json.dumps(
            surgery.describe(bare, made.program, made.structure, widths=widths, biased=[path])
        )
    )
    assert written["biased"] == [path]
    again = copy.deepcopy(bare)
    surgery.apply_structure_(again, written)
    again.load_state_dict(bare.state_dict(), strict=False)
    assert torch.equal(again.get_submodule(path).bias, torch.zeros(32))
    assert torch.equal(first(again(**made.example)), first(bare(**made.example)))


def test_a_reshaped_copy_shares_what_does_not_change_and_leaves_the_model_as_it_was() -> None:
    made = case("bert")
    before = {n: t.clone() for n, t in made.module.state_dict().items()}
    kept = everything(made) | {made.sites[1].name: [0, 1]}
    written = described(made, {n: len(k) for n, k in kept.items()})
    copied = surgery.reshaped(made.module, written)
    mine = dict(made.module.named_parameters())
    changed = {n for n, t in copied.named_parameters() if t is not mine[n]}
    assert changed == set(written["tensors"]) == {p.parameter for p in made.sites[1].slices}
    assert all(torch.equal(t, before[n]) for n, t in made.module.state_dict().items())
