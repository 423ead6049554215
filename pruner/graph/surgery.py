"""Apply an allocation to a module for good, and rebuild such a module from its description.

`Structure document -> module` is the only way a module is ever reshaped: `zipc.load` and a fresh
compile take the same path, so a checkpoint that loads is a checkpoint that was tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zipc.core.errors import CorruptFile
from zipc.core.types import Site
from zipc.numerics.int8 import DYNAMIC, STATIC, Int8Linear

SCHEMA_VERSION = 1

# Attributes in which modules remember what a site's size was. The value is rewritten only where it
# equals the dense size, so an unrelated attribute of the same name stays as it is.
UNIT_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads")
TOTAL_WIDTHS = ("all_head_size", "inner_dim", "embed_dim", "dim", "intermediate_size")


class ConstantMap(nn.Module):
    """What a linear map becomes when nothing of its input is left: its bias."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


class EmptyMap(nn.Module):
    """What a producer becomes when its consumer is gone: zeros of the dense width.

    The shapes between the two, and whatever else carries the units, stay as they were.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.features)


def describe(
    model: nn.Module,
    sites: Sequence[Site],
    *,
    widths: Mapping[str, int],
    numerics: Mapping[str, str],
) -> dict[str, Any]:
    """The structure document of `model` after the given widths and numerics (module -> numeric)."""
    linears: dict[str, dict[str, Any]] = {}
    tensors: dict[str, list[int]] = {}
    stubs: dict[str, dict[str, Any]] = {}
    attributes: dict[str, dict[str, int]] = {}
    modules = dict(model.named_modules())
    shapes = {n: list(t.shape) for n, t in (*model.named_parameters(), *model.named_buffers())}
    for site in sites:
        kept = widths[site.name]
        if kept == 0:
            for consumer in site.consumers:
                stubs[consumer.module] = {
                    "kind": "constant",
                    "features": shapes[consumer.module + ".weight"][0],
                }
            for path in site.producers:
                features = site.units * _unit_width(site, path)
                stubs[path] = {"kind": "empty", "features": features}
            continue
        for piece in site.slices:
            shapes[piece.parameter][piece.dim] = piece.outer * kept * piece.inner
            owner = piece.parameter.rpartition(".")[0]
            if not isinstance(modules.get(owner), nn.Linear):
                tensors[piece.parameter] = shapes[piece.parameter]
        for path in _owners(site):
            found = _rewrites(modules[path], site, kept)
            if found:
                attributes.setdefault(path, {}).update(found)
    touched = {m for s in sites for m in (*s.producers, *(c.module for c in s.consumers))}
    for path in sorted(touched | set(numerics)):
        if path in stubs:
            continue
        out_features, in_features = shapes[path + ".weight"]
        linears[path] = {
            "in_features": in_features,
            "out_features": out_features,
            "bias": True if path in touched else getattr(modules[path], "bias", None) is not None,
            "numeric": numerics.get(path, "fp32"),
        }
        if path in {p for s in sites for p in s.producers}:
            linears[path]["bias"] = getattr(modules[path], "bias", None) is not None
    return {
        "schema_version": SCHEMA_VERSION,
        "linears": linears,
        "tensors": tensors,
        "stubs": stubs,
        "attributes": attributes,
    }


def apply_structure_(model: nn.Module, document: Mapping[str, Any]) -> None:
    """Reshape `model` in place to a structure document; its new tensors are uninitialised.

    Raises:
        CorruptFile: the document has a newer schema or names modules the model does not have.
    """
    if document.get("schema_version") != SCHEMA_VERSION:
        raise CorruptFile(
            f"structure.json has schema {document.get('schema_version')!r}; this zipc reads "
            f"{SCHEMA_VERSION}. Update zipc, or compile again."
        )
    try:
        for path, spec in document["linears"].items():
            model.get_submodule(path)
            shape = (int(spec["in_features"]), int(spec["out_features"]))
            fresh: nn.Module
            if spec["numeric"] == "fp32":
                fresh = nn.Linear(*shape, bias=bool(spec["bias"]))
            elif spec["numeric"] in (DYNAMIC, STATIC):
                fresh = Int8Linear(*shape, bias=bool(spec["bias"]), numeric=spec["numeric"])
            else:
                raise ValueError(f"unknown numeric {spec['numeric']!r} of {path}")
            model.set_submodule(path, fresh)
        for path, spec in document["stubs"].items():
            model.get_submodule(path)
            stub = {"constant": ConstantMap, "empty": EmptyMap}[spec["kind"]]
            model.set_submodule(path, stub(int(spec["features"])))
        for name, shape_list in document["tensors"].items():
            owner, _, leaf = name.rpartition(".")
            old = getattr(model.get_submodule(owner), leaf)
            new = torch.zeros(*shape_list, dtype=old.dtype)
            value = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
            setattr(model.get_submodule(owner), leaf, value)
        for path, values in document["attributes"].items():
            for attribute, number in values.items():
                setattr(model.get_submodule(path), attribute, int(number))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CorruptFile(f"structure.json does not fit the model: {error}") from error


def cut(tensor: Tensor, site: Site, name: str, kept: Sequence[int]) -> Tensor:
    """Keep units `kept` of `site` in the tensor called `name`."""
    for piece in site.slices:
        if piece.parameter == name:
            index = columns(piece.outer, site.units, piece.inner, kept)
            tensor = tensor.index_select(piece.dim, index)
    return tensor


def columns(outer: int, units: int, inner: int, kept: Iterable[int]) -> Tensor:
    """Flat indices of `kept` units in a dimension laid out (outer, units, inner)."""
    grid = torch.arange(outer * units * inner).view(outer, units, inner)
    return grid[:, list(kept), :].reshape(-1)


def _unit_width(site: Site, path: str) -> int:
    for piece in site.slices:
        if piece.parameter == path + ".weight" and piece.dim == 0:
            return piece.outer * piece.inner
    raise AssertionError(f"{path} does not produce {site.name}")


def _owners(site: Site) -> list[str]:
    """Modules that may remember the site's size: the parents of its producers."""
    parents = [p.rpartition(".")[0] for p in site.producers]
    return sorted({p for p in parents if p})


def _rewrites(module: nn.Module, site: Site, kept: int) -> dict[str, int]:
    inner = _unit_width(site, site.producers[0])
    found = {}
    for name, value in vars(module).items():
        if type(value) is not int:
            continue
        if site.kind == "heads" and name in UNIT_COUNTS and value == site.units:
            found[name] = kept
        if name in TOTAL_WIDTHS and value == site.units * inner:
            found[name] = kept * inner
    return found
