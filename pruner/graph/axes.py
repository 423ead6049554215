"""Name every dimension of a traced graph by unification.

A dimension is an ordered list of *atoms* (outer to inner). Operations equate dimensions: a residual
add says that two widths are the same, a view that splits 384 into 12 x 32 says that 384 was
two atoms all along. What is left at the end are classes of dimensions that must change together,
which is exactly the dependency closure of structured pruning. An atom that an operation does not
treat index by index (softmax, normalisation, an unknown op) is *pinned*, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from zipc.pruner.graph.trace import Program

Size = int | str  # a symbolic size is its expression


class Atom:
    """One indivisible factor of a dimension; a union-find node that may be split later."""

    __slots__ = ("parts", "pins", "roles", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parts: list[Atom] | None = None  # a split, or a single-element link to another atom
        self.pins: list[str] = []
        self.roles: set[str] = set()


Dim = list[Atom]


def flatten(dim: Sequence[Atom]) -> Dim:
    """Resolve links and splits to root atoms; size-one atoms vanish."""
    roots: Dim = []
    for atom in dim:
        if atom.parts is not None:
            roots += flatten(atom.parts)
        elif atom.size != 1:
            roots.append(atom)
    return roots


def pin(dims: Sequence[Dim], reason: str) -> None:
    for dim in dims:
        for atom in flatten(dim):
            atom.pins.append(reason)


def unify(left: Dim, right: Dim, *, where: str) -> None:
    """Make two dimensions the same, splitting atoms to their common refinement."""
    a, b = flatten(left), flatten(right)
    while a and b:
        x, y = a[0], b[0]
        if x is y:
            a, b = a[1:], b[1:]
        elif x.size == y.size:
            y.parts = [x]
            x.pins += y.pins
            x.roles |= y.roles
            a, b = flatten(a[1:]), flatten(b[1:])
        elif isinstance(x.size, int) and isinstance(y.size, int):
            small, big = (x, y) if x.size < y.size else (y, x)
            if not _split(big, int(small.size)):
                break
            a, b = flatten(a), flatten(b)
        else:
            break
    if a or b:
        pin([left, right], f"its sizes do not line up at {where}")


def _split(atom: Atom, outer: int) -> bool:
    """Split `atom` into (outer, rest); pins and roles are inherited."""
    assert isinstance(atom.size, int)
    if outer <= 1 or atom.size % outer:
        return False
    parts = [Atom(outer), Atom(atom.size // outer)]
    for part in parts:
        part.pins = list(atom.pins)
        part.roles = set(atom.roles)
    atom.parts = parts
    return True


class Axes:
    """Dimensions of every tensor node and of every parameter of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of: dict[str, list[Dim]] = {}
        self._tensor_dims: dict[str, list[Dim]] = {}
        for node in program.nodes:
            self._visit(node)
        for node in program.outputs:
            pin(self.of.get(node.name, []), "it is part of the model's output")

    def parameter(self, name: str) -> list[Dim]:
        return self._tensor_dims[name]

    @property
    def parameters(self) -> dict[str, list[Dim]]:
        return self._tensor_dims

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            held = self.program.tensor_of(node)
            if held is not None:
                name, value = held
                if name not in self._tensor_dims:
                    self._tensor_dims[name] = [[Atom(int(s))] for s in value.shape]
                    if name in self.program.fixed:
                        pin(self._tensor_dims[name], self.program.fixed[name])
                self.of[node.name] = self._tensor_dims[name]
            else:
                self.of[node.name] = _fresh(node)
                pin(self.of[node.name], "it is part of the model's input")
            return
        if node.op != "call_function":
            return
        if not _is_tensor(node):
            _opaque(self, node)
            return
        rule = RULES.get(_base_name(node.target), _unknown)
        self.of[node.name] = rule(self, node)

    def dims(self, node: Any) -> list[Dim]:
        return self.of.get(node.name, []) if isinstance(node, fx.Node) else []


def _base_name(target: Any) -> str:
    return str(target).removeprefix("aten.").split(".")[0]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _shape(node: fx.Node) -> list[Size]:
    return [s if isinstance(s, int) else str(s) for s in node.meta["val"].shape]


def _fresh(node: fx.Node) -> list[Dim]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return []
    return [[Atom(s)] for s in _shape(node)]


# --- one rule per family of operations ---------------------------------------------------------


def _unknown(axes: Axes, node: fx.Node) -> list[Dim]:
    """An op nobody described: everything it touches keeps its size."""
    out = _fresh(node)
    reason = f"op {_base_name(node.target)} ({node.name}) is not understood"
    for source in node.all_input_nodes:
        pin(axes.dims(source), reason)
    pin(out, reason)
    return out


def _opaque(axes: Axes, node: fx.Node) -> None:
    """Chunk, split, topk and others that return several tensors; sizes and checks are harmless."""
    if isinstance(node.meta.get("val"), (list, tuple)):
        reason = f"op {_base_name(node.target)} ({node.name}) takes it apart"
        pin([d for source in node.all_input_nodes for d in axes.dims(source)], reason)


def _elementwise(axes: Axes, node: fx.Node) -> list[Dim]:
    """Broadcasting element-wise op: aligned dimensions are the same dimension."""
    shape = _shape(node)
    out: list[Dim | None] = [None] * len(shape)
    for source in node.all_input_nodes:
        dims = axes.dims(source)
        if not dims:
            continue
        sizes = _shape(source)
        for i in range(1, len(dims) + 1):
            if sizes[-i] == 1 and shape[-i] != 1:
                continue
            held = out[-i]
            if held is None:
                out[-i] = dims[-i]
            else:
                unify(held, dims[-i], where=node.name)
    return [d if d is not None else [Atom(s)] for d, s in zip(out, shape, strict=True)]


def _linear(axes: Axes, node: fx.Node) -> list[Dim]:
    x, weight = axes.dims(node.args[0]), axes.dims(node.args[1])
    unify(x[-1], weight[1], where=node.name)
    if len(node.args) > 2 and node.args[2] is not None:
        unify(weight[0], axes.dims(node.args[2])[0], where=node.name)
    foreign = _foreign(axes.program, node)
    if foreign:
        pin([weight[0], weight[1]], foreign)
    return [*x[:-1], weight[0]]


def _foreign(program: Program, node: fx.Node) -> str | None:
    """Why the weight is not that of a plain nn.Linear: nothing else can be put in its place."""
    weight = node.args[1]
    held = program.tensor_of(weight)
    if held is None or not isinstance(weight, fx.Node):
        return f"the weight of {node.name} is computed"
    if any(user.target is not node.target or user.args[0] is weight for user in weight.users):
        return f"{held[0]} is used by other operations too"
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1]
    bias = program.tensor_of(node.args[2]) if len(node.args) > 2 else None
    names = [held[0]] + ([bias[0]] if bias else [])
    if str(kind) != "torch.nn.modules.linear.Linear":
        return f"{held[0]} belongs to a {str(kind).rpartition('.')[2]}, not to an nn.Linear"
    if names != [f"{path}.weight", f"{path}.bias"][: len(names)]:
        return f"{path} computes with the weights of another module ({', '.join(names)})"
    return None


def _view(axes: Axes, node: fx.Node) -> list[Dim]:
    """Regroup atoms: the flat sequence of atoms is unchanged, only the brackets move."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    pool = flatten([atom for dim in axes.dims(source) for atom in dim])
    out: list[Dim] = []
    for size in _shape(node):
        taken: Dim = []
        if isinstance(size, str):
            if not pool or pool[0].size != size:
                return _unknown(axes, node)
            taken = [pool.pop(0)]
        else:
            left = size
            while left > 1:
                if not pool or isinstance(pool[0].size, str):
                    return _unknown(axes, node)
                head = int(pool[0].size)
                if left % head == 0:
                    taken.append(pool.pop(0))
                    left //= head
                elif head % left == 0 and _split(pool[0], left):
                    pool = flatten(pool)
                else:
                    return _unknown(axes, node)
        out.append(taken if taken else [Atom(1)])
    return out


def _permute(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = axes.dims(node.args[0])
    order: Any = node.args[1]
    return [dims[int(i)] for i in order]


def _transpose(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = list(axes.dims(node.args[0]))
    if len(node.args) == 1:  # aten.t
        return dims[::-1]
    i, j = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    dims[i], dims[j] = dims[j], dims[i]
    return dims


def _unsqueeze(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = list(axes.dims(node.args[0]))
    at = int(node.args[1])  # type: ignore[arg-type]
    dims.insert(at if at >= 0 else len(dims) + 1 + at, [Atom(1)])
    return dims


def _squeeze(axes: Axes, node: fx.Node) -> list[Dim]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims, sizes = axes.dims(source), _shape(source)
    over: Any = node.args[1] if len(node.args) > 1 else range(len(dims))
    for at in [over] if isinstance(over, int) else over:
        if sizes[at] != 1:
            pin([dims[at]], f"it would vanish at size one ({node.name})")
    kept = [d for d, s in zip(dims, sizes, strict=True) if s != 1]
    return kept if len(kept) == len(_shape(node)) else _unknown(axes, node)


def _expand(axes: Axes, node: fx.Node) -> list[Dim]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims, sizes, shape = axes.dims(source), _shape(source), _shape(node)
    out: list[Dim] = [[Atom(s)] for s in shape[: len(shape) - len(dims)]]
    for dim, before, after in zip(dims, sizes, shape[len(shape) - len(dims) :], strict=True):
        out.append(dim if before == after else [Atom(after)])
    return out


def _attention(axes: Axes, node: fx.Node) -> list[Dim]:
    """softmax(q k' + mask) v: batch-like dimensions are shared, the inner ones are contracted."""
    q, k, v = (axes.dims(a) for a in node.args[:3])
    for i in range(len(q) - 2):
        unify(q[i], k[i], where=node.name)
        unify(k[i], v[i], where=node.name)
        for atom in flatten(q[i]):
            atom.roles.add("heads")
    unify(q[-1], k[-1], where=node.name)
    unify(k[-2], v[-2], where=node.name)
    pin([q[-1], v[-1]], "the size of a head is built into the scale of the attention")
    pin([q[-2], k[-2]], "it is the sequence")
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node):
        dims, sizes = axes.dims(mask), _shape(mask)
        for i in range(3, len(dims) + 1):
            if sizes[-i] != 1:
                unify(dims[-i], q[-i], where=node.name)
    return [*q[:-1], v[-1]]


def _matmul(axes: Axes, node: fx.Node) -> list[Dim]:
    """Batched product of two activations (eager attention); 2-D weights are left alone."""
    a, b = (axes.dims(x) for x in node.args[:2])
    if len(a) < 3 or len(a) != len(b):
        return _unknown(axes, node)
    for i in range(len(a) - 2):
        unify(a[i], b[i], where=node.name)
        for atom in flatten(a[i]):
            atom.roles.add("heads")
    unify(a[-1], b[-2], where=node.name)
    pin([a[-1]], f"it is contracted between activations ({node.name})")
    pin([a[-2], b[-1]], f"it belongs to an attention product ({node.name})")
    return [*a[:-1], b[-1]]


def _softmax(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = axes.dims(node.args[0])
    pin([dims[int(node.args[1])]], "a softmax runs over it")  # type: ignore[arg-type]
    return dims


def _layer_norm(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = axes.dims(node.args[0])
    over = node.args[1]
    assert isinstance(over, (list, tuple))
    normed = dims[len(dims) - len(over) :]
    for source in node.args[2:4]:
        for own, dim in zip(axes.dims(source), normed, strict=False):
            unify(own, dim, where=node.name)
    pin(normed, "a normalisation runs over it (the residual width)")
    return dims


def _embedding(axes: Axes, node: fx.Node) -> list[Dim]:
    weight, index = axes.dims(node.args[0]), axes.dims(node.args[1])
    pin([weight[0]], "it is a vocabulary")
    return [*index, weight[1]]


def _select(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = list(axes.dims(node.args[0]))
    gone = dims.pop(int(node.args[1]))  # type: ignore[arg-type]
    pin([gone], f"one index of it is selected ({node.name})")
    return dims


def _slice(axes: Axes, node: fx.Node) -> list[Dim]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims = list(axes.dims(source))
    at = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    if _shape(source)[at] != _shape(node)[at]:
        pin([dims[at]], f"a part of it is sliced out ({node.name})")
        dims[at] = [Atom(_shape(node)[at])]
        pin([dims[at]], f"it was sliced out ({node.name})")
    return dims


def _reduce(axes: Axes, node: fx.Node) -> list[Dim]:
    """Mean, sum, max over dimensions: those are pinned, the others pass."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    over: Any = node.args[1] if len(node.args) > 1 else None
    dims = axes.dims(source)
    indices = over if isinstance(over, (list, tuple)) else [over]
    if not all(isinstance(i, int) for i in indices):
        return _unknown(axes, node)
    gone = {int(i) % len(dims) for i in indices}
    pin([dims[i] for i in gone], f"it is reduced ({node.name})")
    kept = [d for i, d in enumerate(dims) if i not in gone]
    if len(kept) == len(_shape(node)):
        return kept
    return [[Atom(1)] if i in gone else d for i, d in enumerate(dims)]


def _free(axes: Axes, node: fx.Node) -> list[Dim]:
    """A fresh tensor that depends on sizes only (arange, ones): its dimensions are fixed."""
    out = _fresh(node)
    pin(out, f"it is created with a fixed size ({node.name})")
    return out


Rule = Callable[[Axes, fx.Node], list[Dim]]

_ELEMENTWISE = """
    gelu relu silu tanh sigmoid erf exp log sqrt rsqrt neg abs pow hardswish hardsigmoid elu selu
    leaky_relu mish softplus relu6 hardtanh clamp clamp_min clamp_max square reciprocal
    add sub mul div add_ mul_ sub_ div_ rsub maximum minimum where masked_fill
    eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
    __and__ __or__ dropout contiguous clone detach alias to _to_copy type_as float lift_fresh_copy
    nan_to_num isnan cos sin round floor ceil sign
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "flatten"], _view),
    **dict.fromkeys(["transpose", "t"], _transpose),
    **dict.fromkeys(["softmax", "_softmax", "log_softmax"], _softmax),
    **dict.fromkeys(["mean", "sum", "amax", "amin"], _reduce),
    **dict.fromkeys(["matmul", "bmm"], _matmul),
    **dict.fromkeys(["arange", "ones", "zeros", "full", "new_ones", "new_zeros"], _free),
    "linear": _linear,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "scaled_dot_product_attention": _attention,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
    "select": _select,
    "slice": _slice,
}


def product(dim: Sequence[Atom]) -> int:
    """Number of indices of a dimension whose atoms are all concrete."""
    return math.prod(int(a.size) for a in dim)
