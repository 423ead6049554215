"""Apply an allocation to a module for good, and rebuild such a module from its description.

`Structure document -> module` is the only way a module is ever reshaped: `zipc.load` and a fresh
compile take the same path, so a checkpoint that loads is a checkpoint that was tested.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zipc.core.errors import CorruptFile
from zipc.core.nodes import module_of
from zipc.core.types import Site
from zipc.numerics.bf16 import BF16, Bf16Linear
from zipc.numerics.int4 import INT4
from zipc.numerics.int8 import DYNAMIC, STATIC, Int8Linear
from zipc.pruner.graph.cuts import Cuts
from zipc.pruner.graph.mixtures import within
from zipc.pruner.graph.sites import Structure, extent_size
from zipc.pruner.graph.trace import Program, op_name

SCHEMA_VERSION = 4

# What modules remember of the shape of a tensor: class -> tensor -> attribute of each dimension.
# The attributes of the channels that a grouped map holds per group are multiplied by its groups.
REMEMBERED: dict[str, tuple[str, tuple[str, ...]]] = {
    "Linear": ("weight", ("out_features", "in_features")),
    "Conv1D": ("weight", ("nx", "nf")),
    **dict.fromkeys(["Conv1d", "Conv2d", "Conv3d"], ("weight", ("out_channels", "in_channels"))),
    **dict.fromkeys(
        ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"],
        ("weight", ("in_channels", "out_channels")),
    ),
    **dict.fromkeys(
        [f"{kind}Norm{n}d" for kind in ("Batch", "Instance") for n in (1, 2, 3)],
        ("weight", ("num_features",)),
    ),
    "GroupNorm": ("weight", ("num_channels",)),
    "Embedding": ("weight", ("num_embeddings", "embedding_dim")),
    "PReLU": ("weight", ("num_parameters",)),
}
PER_GROUP = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")


# Attributes in which modules remember what a site's size was. A hint only: whether a module with
# them rewritten computes the right thing is tried out (`verify`).
UNIT_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_key_value_heads")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
TOTAL_WIDTHS = tuple("all_head_size inner_dim embed_dim dim intermediate_size split_size".split())


Window = Sequence[Sequence[int]]  # (kernel, stride, padding, dilation) of each spatial axis


class ConstantMap(nn.Module):
    """What a map becomes when nothing of its input is left: its bias."""

    def __init__(self, features: int, window: Window = ()) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))
        _nothing_as_weight_(self)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return _spread(self.bias, x, self.window)


class EmptyMap(nn.Module):
    """What a producer becomes when its consumer is gone: zeros of the dense width.

    The shapes between the two, and whatever else carries the units, stay as they were.
    """

    def __init__(self, features: int, window: Window = ()) -> None:
        super().__init__()
        _nothing_as_weight_(self)
        self.features = features
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return _spread(x.new_zeros(self.features), x, self.window)


def _nothing_as_weight_(module: nn.Module) -> None:
    """Some code asks a map for the dtype of its weight before it calls it, as T5's does."""
    module.register_buffer("weight", torch.zeros(0), persistent=False)


def _spread(values: Tensor, x: Tensor, window: Window) -> Tensor:
    """A value per output channel at every position that a map of `x` has."""
    if not window:
        return values.expand(*x.shape[:-1], -1)
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, (k, s, p, d) in zip(x.shape[2:], window, strict=True)
    ]
    return values.view(-1, *[1] * len(sizes)).expand(len(x), -1, *sizes)


def describe(
    model: nn.Module,
    program: Program,
    structure: Structure,
    *,
    widths: Mapping[str, int],
    numerics: Mapping[str, str] | None = None,
    biased: Sequence[str] = (),
    untied: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> dict[str, Any]:
    """The structure document of `model` at the given widths and numerics (module -> numeric).

    `biased` are maps that get a bias which the dense model lacks, `untied` those that have their
    weight to themselves from now on, `dropped` modules that go.
    """
    numerics = numerics or {}
    modules = dict(model.named_modules())
    calls = {call.module: call for call in program.maps}
    dense = {n: list(t.shape) for n, t in (*model.named_parameters(), *model.named_buffers())}
    stubs: dict[str, dict[str, Any]] = {}
    for site in structure.sites:
        if widths.get(site.name, site.units) == 0:
            for path in site.maps:
                if path in stubs and stubs[path]["kind"] == "empty":
                    continue  # nothing reads it, whatever it has lost itself
                call = calls[path]
                features = dense[call.weight][call.out_dim] * (
                    call.groups if call.transposed else 1
                )
                kind = "empty" if path in site.producers else "constant"
                stubs[path] = {"kind": kind, "features": features, "window": call.window or []}
    # around a removed site all shapes stay as they were, less what other sites cut
    widths = {name: width for name, width in widths.items() if width}
    cuts = Cuts(s for s in structure.sites if s.name in widths)
    shapes = {n: cuts.shape(n, dense[n], widths) for n in cuts.pieces if n in dense}
    shapes = {n: s for n, s in shapes.items() if s != dense[n] and _owner(n) not in stubs}
    for path, stub in stubs.items():  # what a stub gives may be cut by other sites
        name = calls[path].weight
        if name in cuts.pieces:
            stub["features"] = cuts.shape(name, dense[name], widths)[calls[path].out_dim]
    attributes: dict[str, dict[str, Any]] = {}
    groups = _groups(program, structure, widths)
    for path in {_owner(n) for n in shapes}:
        found = _own_attributes(modules[path], shapes.get(f"{path}.weight"), groups.get(path))
        attributes.setdefault(path, {}).update(found)
    for rewrite in structure.attributes:
        value = widths.get(rewrite.site, 0) * rewrite.factor
        if value and rewrite.module not in stubs:
            attributes.setdefault(rewrite.module, {})[rewrite.attribute] = value
    gone = {p for p in modules if within(p, dropped)}
    held = gone.union(stubs)
    return {
        "schema_version": SCHEMA_VERSION,
        "tensors": {n: s for n, s in shapes.items() if _owner(n) not in gone},
        "numerics": {p: n for p, n in numerics.items() if n != "fp32" and p not in held},
        "biased": [p for p in biased if p not in held and modules[p].bias is None],
        "untied": [p for p in untied if p not in held],
        "stubs": {p: s for p, s in stubs.items() if p not in gone},
        "attributes": {p: a for p, a in attributes.items() if a and p not in gone},
        "dropped": sorted(dropped),
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
        for name, shape in document["tensors"].items():
            _reshape_(model, name, [int(n) for n in shape])
        for path, values in document["attributes"].items():
            owner = model.get_submodule(path)
            for attribute, value in values.items():
                getattr(owner, attribute)  # one that is not there is of another architecture
                setattr(owner, attribute, _typed(value))
        for path in document["untied"]:
            owner = model.get_submodule(path)
            owner.weight = nn.Parameter(owner.get_parameter("weight").clone())
        for path in document["biased"]:
            owner = model.get_submodule(path)
            weight = owner.get_parameter("weight")
            features = getattr(owner, "out_channels", getattr(owner, "out_features", None))
            owner.bias = nn.Parameter(weight.new_zeros(int(features or weight.shape[-1])))
        for path, numeric in document["numerics"].items():
            if numeric not in (BF16, DYNAMIC, STATIC, INT4):
                raise ValueError(f"unknown numeric {numeric!r} of {path}")
            old = model.get_submodule(path)
            weight = old.get_parameter("weight")
            shape = list(weight.shape if isinstance(old, nn.Linear) else weight.T.shape)
            biased = old.bias is not None
            if numeric == BF16:
                made: nn.Module = Bf16Linear(shape[1], shape[0], bias=biased)
            else:
                made = Int8Linear(shape[1], shape[0], bias=biased, numeric=numeric)
            model.set_submodule(path, made)
        for path in document["dropped"]:
            delattr(model.get_submodule(_owner(path)), path.rpartition(".")[2])
        for path, spec in document["stubs"].items():
            like = model.get_submodule(path).get_parameter("weight")
            stub = {"constant": ConstantMap, "empty": EmptyMap}[spec["kind"]]
            model.set_submodule(path, stub(int(spec["features"]), spec["window"]).to(like))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CorruptFile(f"structure.json does not fit the model: {error}") from error


def reshaped(model: nn.Module, document: Mapping[str, Any]) -> nn.Module:
    """A copy of `model` reshaped to a document; what it does not change is shared, not copied."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, dict(shared))
    apply_structure_(made, document)
    return made


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _typed(value: Any) -> Any:
    return tuple(int(v) for v in value) if isinstance(value, list) else int(value)


def _reshape_(model: nn.Module, name: str, shape: list[int]) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if isinstance(old, nn.Parameter):
        setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, leaf, new)


def _groups(program: Program, structure: Structure, widths: Mapping[str, int]) -> dict[str, int]:
    """Groups left, by the path of the module that is called with them."""
    found: dict[str, int] = {}
    for node in program.nodes:
        extent = structure.groups.get(node.name)
        if extent is not None and op_name(node) not in ("layer_norm",):
            found[module_of(node)[0]] = extent_size(extent, widths) or 1
    return found


def _own_attributes(
    module: nn.Module, weight: Sequence[int] | None, groups: int | None
) -> dict[str, Any]:
    """What a module of a known class must remember of the new shape of its weight."""
    kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in REMEMBERED), None)
    if isinstance(module, nn.LayerNorm) and weight is not None:
        return {"normalized_shape": list(weight)}
    if kind is None or weight is None:
        return {}
    found: dict[str, Any] = dict(zip(REMEMBERED[kind][1], weight, strict=False))
    if kind in PER_GROUP:
        found["groups"] = groups or 1
        shared = "out_channels" if kind.startswith("ConvTranspose") else "in_channels"
        found[shared] *= found["groups"]
    if kind == "GroupNorm":
        found["num_groups"] = groups or int(module.num_groups)  # type: ignore[arg-type]
    return found


def attribute_candidates(
    model: nn.Module, site: Site, *, every: bool
) -> list[tuple[str, str, int]]:
    """(module, attribute, factor) of integers that may be the site's size times a factor.

    They are those of modules around the ones that carry the units; `every` takes any attribute of
    the right value, otherwise only those with a name that says so.
    """
    if site.kind == "width" and not every:
        return []  # a number of that name is as large by way of the heads, mostly
    around = {_owner(_owner(piece.parameter)) for piece in site.slices}
    if site.experts:
        around |= {*site.producers, *(_owner(m) for e in site.experts for m in e.modules)}
    if every:
        around |= {p for path in around for p in _ancestors(path)}
    factors = {1, *(len(piece.index[0]) for piece in site.slices)}
    found = []
    for path in sorted(p for p in around if p):
        module = model.get_submodule(path)
        for name, value in vars(module).items():
            if type(value) is not int or value == 0 or value % site.units:
                continue
            factor = value // site.units
            counts = name in {"heads": UNIT_COUNTS, "experts": EXPERT_COUNTS}.get(site.kind, ())
            if counts or (factor in factors and (every or name in TOTAL_WIDTHS)):
                found.append((path, name, factor))
    return found
