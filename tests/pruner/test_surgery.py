"""A structure document says all there is to say about the shape of a module."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from tests.tiny_models import (
    FAMILIES,
    build,
    case,
    everything,
    first,
    random_kept,
    surgered,
    text,
)
from zipc.core.errors import CorruptFile
from zipc.core.types import Consumer, Site, Slice
from zipc.numerics.int8 import DYNAMIC, STATIC, Int8Linear
from zipc.pruner.graph import surgery

families = pytest.mark.parametrize("family", FAMILIES)


def document(family: str, seed: int, numerics: dict[str, str] | None = None) -> dict[str, Any]:
    made = case(family)
    widths = {n: len(k) for n, k in random_kept(made, seed).items()}
    return surgery.describe(made.module, made.sites, widths=widths, numerics=numerics or {})


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
    whole = surgery.describe(made.module, made.sites, widths=widths, numerics={})
    again = copy.deepcopy(made.module)
    surgery.apply_structure_(again, whole)
    shapes = {n: t.shape for n, t in again.state_dict().items()}
    assert shapes == {n: t.shape for n, t in made.module.state_dict().items()}
    assert not whole["stubs"]


@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC])
def test_numerics_come_back_as_integer_linears(numeric: str) -> None:
    made = case("bert")
    site = made.sites[1]
    paths = [*site.producers, *(c.module for c in site.consumers)]
    kept = everything(made) | {site.name: [1, 4, 5]}
    widths = {n: len(k) for n, k in kept.items()}
    numerics = dict.fromkeys(paths, numeric)
    written = json.loads(
        json.dumps(surgery.describe(made.module, made.sites, widths=widths, numerics=numerics))
    )
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
    for site in made.sites:
        if site.kind == "heads":
            kept[site.name] = [0, 2, 3]
    pruned = surgered(made, kept)
    found = 0
    for site in made.sites:
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


def _broken(change: str) -> dict[str, Any]:
    written: dict[str, Any] = copy.deepcopy(document("mpnet", 2))
    if change == "unknown linear":
        written["linears"]["encoder.nowhere.dense"] = next(iter(written["linears"].values()))
    elif change == "unknown stub":
        written["stubs"]["encoder.layer.9.dense"] = {"kind": "constant", "features": 3}
    elif change == "unknown tensor":
        written["tensors"]["encoder.relative.weight"] = [3, 3]
    elif change == "unknown owner of an attribute":
        written["attributes"]["encoder.layer.7"] = {"num_attention_heads": 3}
    elif change == "missing part":
        del written["tensors"]
    elif change == "missing size":
        del next(iter(written["linears"].values()))["in_features"]
    elif change == "size is a word":
        next(iter(written["linears"].values()))["in_features"] = "wide"
    elif change == "size is negative":
        next(iter(written["linears"].values()))["out_features"] = -4
    elif change == "part is a list":
        written["linears"] = [1, 2]
    elif change == "unknown numeric":
        next(iter(written["linears"].values()))["numeric"] = "int3"
    elif change == "unknown kind of stub":
        written["stubs"]["pooler.dense"] = {"kind": "surprise", "features": 3}
    elif change == "unknown attribute":
        written["attributes"] = {"encoder.layer.0.attention.attn": {"__class__": 3}}
    elif change == "no module at all":
        written["linears"][""] = next(iter(written["linears"].values()))
    return written


@pytest.mark.parametrize(
    "change",
    [
        "unknown linear",
        "unknown stub",
        "unknown tensor",
        "unknown owner of an attribute",
        "missing part",
        "missing size",
        "size is a word",
        "size is negative",
        "part is a list",
        "unknown numeric",
        "unknown kind of stub",
        "unknown attribute",
        "no module at all",
    ],
)
def test_an_edited_document_is_a_corrupt_file(change: str) -> None:
    with pytest.raises(CorruptFile):
        surgery.apply_structure_(build("mpnet"), _broken(change))


def test_a_document_of_another_architecture_is_a_corrupt_file() -> None:
    with pytest.raises(CorruptFile, match="does not fit"):
        surgery.apply_structure_(build("distilbert"), document("bert", 0))


def test_units_are_cut_out_of_the_middle_of_a_dimension() -> None:
    """(outer, units, inner) against an explicit loop over flat indices."""
    outer, units, inner, kept = 2, 5, 3, [0, 3, 4]
    want = [(o * units + u) * inner + i for o in range(outer) for u in kept for i in range(inner)]
    assert surgery.columns(outer, units, inner, kept).tolist() == want
    assert surgery.columns(outer, units, inner, []).tolist() == []
    site = Site(
        name="s",
        kind="ffn",
        units=units,
        slices=(Slice("w", 1, outer, inner),),
        consumers=(Consumer("m", outer, inner),),
        producers=("p",),
        signature="",
    )
    weight = torch.arange(60.0).view(2, 30)
    assert torch.equal(surgery.cut(weight, site, "w", kept), weight[:, want])
    assert torch.equal(surgery.cut(weight, site, "other", kept), weight)


def test_stubs_keep_shapes_and_gradients_out() -> None:
    constant, empty = surgery.ConstantMap(4), surgery.EmptyMap(6)
    constant.bias.data = torch.arange(4.0)
    x = torch.randn(2, 3, 9)
    assert torch.equal(constant(x), torch.arange(4.0).expand(2, 3, 4))
    assert torch.equal(empty(x), torch.zeros(2, 3, 6))
