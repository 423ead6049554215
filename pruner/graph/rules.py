"""How each operation relates the dimensions it reads to those it gives: one rule per family.

A rule takes the dimensions of its sources and returns those of its result, unifying and pinning on
the way. What no rule describes is pinned as a whole: never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from zipc.pruner.graph.axes import (
    Atom,
    Dim,
    Size,
    carve,
    concatenated,
    flatten,
    is_concrete,
    mark,
    pin,
    product,
    take,
    tie,
    unify,
)
from zipc.pruner.graph.trace import MAP_MODULES, MapCall, Program, op_name

Result = list[Dim] | list[list[Dim]]  # of a tensor, or of each of several
RESIDUAL, HEADS, GROUPED, NORMED = "residual", "heads", "grouped", "normed"
CREATED = {"zeros": 0, "ones": 0, "full": 0, "new_ones": 1, "new_zeros": 1, "new_full": 1}


class Axes:
    """Dimensions of every tensor node and of every parameter of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.of: dict[str, list[Dim]] = {}
        self.many: dict[str, list[list[Dim]]] = {}  # nodes that give several tensors
        self.groups: dict[str, Dim] = {}  # node with a count of groups as argument -> those groups
        self.choices: dict[str, Dim] = {}  # top-k node -> what it takes the largest of
        self.chosen: dict[str, Dim] = {}  # node that holds indices -> what they are indices of
        self.picks: dict[str, int] = {}  # slice of one index -> that index
        self.parameters: dict[str, list[Dim]] = {}
        self.calls: dict[str, MapCall] = {c.node: c for c in program.maps}
        for node in program.nodes:
            self._visit(node)
        for node in program.outputs:
            pin(self.of.get(node.name, []), "it is part of the model's output")

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            held = self.program.tensor_of(node)
            if held is not None:
                name, value = held
                if name not in self.parameters:
                    self.parameters[name] = [[Atom(int(s))] for s in value.shape]
                    if name in self.program.fixed:
                        pin(self.parameters[name], self.program.fixed[name])
                self.of[node.name] = self.parameters[name]
            else:
                self.of[node.name] = _fresh(node)
                if node.name not in self.program.caches:
                    pin(self.of[node.name], "it is part of the model's input")
            return
        if node.op != "call_function":
            return
        for source in node.all_input_nodes:
            if source.name in self.chosen and op_name(node) not in ("scatter", ""):
                pin([self.chosen[source.name]], f"its indices are read ({node.name})")
        rule = RULES.get(op_name(node), _unknown)
        if isinstance(node.meta.get("val"), torch.Tensor):
            result: Any = rule(self, node)
            self.of[node.name] = result
        elif isinstance(node.meta.get("val"), (list, tuple)):
            self.many[node.name] = SEVERAL.get(op_name(node), _opaque)(self, node)

    def dims(self, node: Any) -> list[Dim]:
        return self.of.get(node.name, []) if isinstance(node, fx.Node) else []


def shape_of(node: fx.Node) -> list[Size]:
    return _sizes(node.meta["val"])


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of an ATen call, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _sizes(value: torch.Tensor) -> list[Size]:
    return [s if isinstance(s, int) else str(s) for s in value.shape]


def _fresh(node: fx.Node) -> list[Dim]:
    return [[Atom(s)] for s in shape_of(node)]


# --- what is not followed ------------------------------------------------------------------------


def _unknown(axes: Axes, node: fx.Node) -> list[Dim]:
    """An op nobody described: everything it touches keeps its size."""
    out = _fresh(node)
    reason = f"op {op_name(node)} ({node.name}) is not understood"
    for source in node.all_input_nodes:
        pin(axes.dims(source), reason)
    pin(out, reason)
    return out


def _opaque(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    """Top-k and others that return several tensors."""
    reason = f"op {op_name(node)} ({node.name}) takes it apart"
    pin([d for source in node.all_input_nodes for d in axes.dims(source)], reason)
    results = [
        [[Atom(s)] for s in _sizes(v)] if isinstance(v, torch.Tensor) else []
        for v in node.meta["val"]
    ]
    for dims in results:
        pin(dims, reason)
    return results


def _counting(axes: Axes, node: fx.Node) -> list[Dim]:
    """A fresh tensor whose values depend on its size (arange): its dimensions are fixed."""
    out = _fresh(node)
    pin(out, f"it is created with a fixed size ({node.name})")
    return out


def _constant(axes: Axes, node: fx.Node) -> list[Dim]:
    """A fresh tensor of one value: as good at any other size."""
    return _fresh(node)


def _same(axes: Axes, node: fx.Node) -> list[Dim]:
    """The dimensions of the first argument, whatever the others are for."""
    return list(axes.dims(node.args[0]))


# --- element by element --------------------------------------------------------------------------


def _elementwise(axes: Axes, node: fx.Node) -> list[Dim]:
    """Broadcasting element-wise op: aligned dimensions are the same dimension."""
    shape = shape_of(node)
    out: list[Dim | None] = [None] * len(shape)
    for source in node.all_input_nodes:
        dims = axes.dims(source)
        if not dims:
            continue
        sizes = shape_of(source)
        for i in range(1, len(dims) + 1):
            if sizes[-i] == 1 and shape[-i] != 1:
                continue
            held = out[-i]
            if held is None:
                out[-i] = dims[-i]
            else:
                unify(held, dims[-i], where=node.name)
    result = [d if d is not None else [Atom(s)] for d, s in zip(out, shape, strict=True)]
    if op_name(node) in ("add", "sub") and _joins(axes, node):
        mark(result, RESIDUAL)
    return result


def _joins(axes: Axes, node: fx.Node) -> bool:
    """Whether a sum joins two branches, and not a value with a function of itself."""
    terms = [n for n in node.all_input_nodes if axes.dims(n) and axes.program.tensor_of(n) is None]
    if len(terms) != 2 or any(shape_of(t) != shape_of(node) for t in terms):
        return False
    return _origins(terms[0]) != _origins(terms[1])


def _origins(node: fx.Node) -> set[str]:
    """The nearest operations before a value that are not element-wise."""
    found: set[str] = set()
    seen = {node.name}
    stack = [node]
    while stack:
        at = stack.pop()
        if op_name(at) not in _ELEMENTWISE:
            if at.op == "call_function":
                found.add(at.name)
            continue
        for source in at.all_input_nodes:
            if source.name not in seen:
                seen.add(source.name)
                stack.append(source)
    return found


def _softmax(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = axes.dims(node.args[0])
    tie([dims[int(node.args[1])]], "a softmax runs over it")  # type: ignore[arg-type]
    return dims


def _along(axes: Axes, node: fx.Node) -> list[Dim]:
    """Cumulative sums, flips and rolls: the dimension they run along keeps its indices."""
    dims = axes.dims(node.args[0])
    over = argument(node, 2 if op_name(node) == "roll" else 1, "dims", [])
    for i in [over] if isinstance(over, int) else over or range(len(dims)):
        pin([dims[i]], f"{op_name(node)} runs along it ({node.name})")
    return dims


# --- maps ----------------------------------------------------------------------------------------


def _linear(axes: Axes, node: fx.Node) -> list[Dim]:
    call = axes.calls.get(node.name)
    if call is None:
        return _unknown(axes, node)
    weight = axes.parameters[call.weight]
    out, contracted = weight[call.out_dim], weight[call.in_dim]
    source = next(n for n in node.all_input_nodes if n.name == call.source)
    x = axes.dims(source)
    unify(x[-1], contracted, where=node.name)
    if call.bias is not None:
        unify(out, axes.parameters[call.bias][0], where=node.name)
    _pin_foreign(axes, node, call, [out, contracted])
    return [*x[:-1], out]


def _convolution(axes: Axes, node: fx.Node) -> list[Dim]:
    call = axes.calls.get(node.name)
    if call is None or (call.window is None and not call.transposed):
        return _unknown(axes, node)
    weight = axes.parameters[call.weight]
    x = axes.dims(node.args[0])
    own, other = weight[call.out_dim], weight[call.in_dim]
    pin(weight[2:], "it is the kernel")
    if call.groups == 1:
        out, contracted = own, other
    else:
        groups: Dim = [Atom(call.groups)]
        mark([groups], GROUPED)
        axes.groups[node.name] = groups
        dim0 = other if call.transposed else own  # the dimension that holds all groups
        per_group = Atom(product(flatten(dim0)) // call.groups)
        unify(dim0, [*groups, per_group], where=node.name)
        if call.transposed:
            out, contracted = [*groups, *own], other
        else:
            out, contracted = own, [*groups, *other]
    unify(x[1], contracted, where=node.name)
    if call.bias is not None:
        unify(out, axes.parameters[call.bias][0], where=node.name)
    _pin_foreign(axes, node, call, [out, contracted])
    fresh = _fresh(node)
    pin(fresh[2:], "it is a position")
    return [x[0], out, *fresh[2:]]


def _pin_foreign(axes: Axes, node: fx.Node, call: MapCall, dims: list[Dim]) -> None:
    foreign, whole = _foreign(axes.program, node, call)
    if foreign:
        pin(dims if whole else dims[1:], foreign)
        tie(dims, foreign)


def _foreign(program: Program, node: fx.Node, call: MapCall) -> tuple[str | None, bool]:
    """Why the weight is not that of a plain map module: nothing else can be put in its place.

    And whether its rows have to stay too: those of a router go with its experts.
    """
    place = 1 if op_name(node) in ("linear", "mm", "matmul") or call.convolution else 2
    weight = node.args[place]
    assert isinstance(weight, fx.Node)
    if any(u.target is not node.target or u.args.index(weight) != place for u in weight.users):
        return f"{call.weight} is used by other operations too", True
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1]
    kind = str(kind).rpartition(".")[2]
    names = [call.weight] + ([call.bias] if call.bias else [])
    if kind not in MAP_MODULES:
        reason = f"{call.weight} belongs to a {kind}, not to a plain linear map or convolution"
        return reason, call.convolution
    if names != [f"{path}.weight", f"{path}.bias"][: len(names)]:
        return f"{path} computes with the weights of another module ({', '.join(names)})", True
    return None, False


def _embedding(axes: Axes, node: fx.Node) -> list[Dim]:
    weight, index = axes.dims(node.args[0]), axes.dims(node.args[1])
    pin([weight[0]], "it is a vocabulary")
    return [*index, weight[1]]


def _matmul(axes: Axes, node: fx.Node) -> list[Dim]:
    """Batched product of two activations (eager attention), or a map without a module."""
    if node.name in axes.calls:
        return _linear(axes, node)
    a, b = (axes.dims(x) for x in node.args[:2])
    if len(a) < 3 or len(a) != len(b):
        return _unknown(axes, node)
    for i in range(len(a) - 2):
        unify(a[i], b[i], where=node.name)
        mark([a[i]], HEADS)
    unify(a[-1], b[-2], where=node.name)
    pin([a[-1]], f"it is contracted between activations ({node.name})")
    pin([a[-2], b[-1]], f"it belongs to an attention product ({node.name})")
    return [*a[:-1], b[-1]]


def _attention(axes: Axes, node: fx.Node) -> list[Dim]:
    """softmax(q k' + mask) v: batch-like dimensions are shared, the inner ones are contracted."""
    q, k, v = (axes.dims(a) for a in node.args[:3])
    grouped = bool(argument(node, 7, "enable_gqa", False))
    for i in range(len(q) - 2):
        keys = k[i]
        if grouped and i == len(q) - 3 and is_concrete(q[i]) and is_concrete(k[i]):
            share = product(flatten(q[i])) // max(product(flatten(k[i])), 1)
            each = Atom(share)
            if product(flatten(k[i])) > 1:
                pin([[each]], "query heads that share a key and a value go together")
            keys = [*k[i], each]
        unify(q[i], keys, where=node.name)
        unify(k[i], v[i], where=node.name)
        mark([q[i]], HEADS)
    unify(q[-1], k[-1], where=node.name)
    unify(k[-2], v[-2], where=node.name)
    pin([q[-1], v[-1]], "the size of a head is built into the scale of the attention")
    pin([q[-2], k[-2]], "it is the sequence")
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        dims, sizes = axes.dims(mask), shape_of(mask)
        for i in range(3, len(dims) + 1):
            if sizes[-i] != 1:
                unify(dims[-i], q[-i], where=node.name)
    return [*q[:-1], v[-1]]


# --- normalisation -------------------------------------------------------------------------------


def _layer_norm(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = axes.dims(node.args[0])
    over = node.args[1]
    assert isinstance(over, (list, tuple))
    normed = dims[len(dims) - len(over) :]
    for source in node.args[2:4]:
        for own, dim in zip(axes.dims(source), normed, strict=False):
            unify(own, dim, where=node.name)
    mark(normed, NORMED)
    return dims


def _prelu(axes: Axes, node: fx.Node) -> list[Dim]:
    """One slope for all, or one for each channel."""
    dims, (slopes,) = axes.dims(node.args[0]), axes.dims(node.args[1])
    if len(dims) > 1 and slopes:
        unify(dims[1], slopes, where=node.name)
    return dims


def _batch_norm(axes: Axes, node: fx.Node) -> list[Dim]:
    """Per channel: the statistics of evaluation mode are parameters like any other."""
    if op_name(node) == "batch_norm" and argument(node, 5, "training", False):
        return _unknown(axes, node)
    dims = axes.dims(node.args[0])
    for source in node.args[1:5]:
        for own in axes.dims(source):
            unify(dims[1], own, where=node.name)
    return dims


def _group_norm(axes: Axes, node: fx.Node) -> list[Dim]:
    """The channels of a group are normalised together; whole groups are independent."""
    dims = axes.dims(node.args[0])
    count = int(node.args[1])  # type: ignore[arg-type]
    if not is_concrete(dims[1]):
        return _unknown(axes, node)
    inner = Atom(product(flatten(dims[1])) // count)
    groups: Dim = [Atom(count)]
    mark([groups], GROUPED)
    axes.groups[node.name] = groups
    pin([[inner]], "a normalisation runs over it (a group of channels)")
    unify(dims[1], [*groups, inner], where=node.name)
    for source in (argument(node, 2, "weight"), argument(node, 3, "bias")):
        for own in axes.dims(source):
            unify(dims[1], own, where=node.name)
    return dims


# --- layout --------------------------------------------------------------------------------------


def _view(axes: Axes, node: fx.Node) -> list[Dim]:
    """Regroup atoms: the flat sequence of atoms is unchanged, only the brackets move."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    pool = flatten([atom for dim in axes.dims(source) for atom in dim])
    out: list[Dim] = []
    for size in shape_of(node):
        taken = take(pool, size)
        if taken is None:
            return _unknown(axes, node)
        out.append(taken if taken else [Atom(1)])
    return out


def _view_as(axes: Axes, node: fx.Node) -> list[Dim]:
    """A view that is given its shape by another tensor."""
    out = _view(axes, node)
    for own, other in zip(out, axes.dims(node.args[1]), strict=True):
        unify(own, other, where=node.name)
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
    dims, sizes = axes.dims(source), shape_of(source)
    over: Any = node.args[1] if len(node.args) > 1 else range(len(dims))
    named = {int(i) % len(dims) for i in ([over] if isinstance(over, int) else over)}
    for at in named:
        if sizes[at] != 1:
            pin([dims[at]], f"it would vanish at size one ({node.name})")
    kept = [d for i, d in enumerate(dims) if not (i in named and sizes[i] == 1)]
    return kept if len(kept) == len(shape_of(node)) else _unknown(axes, node)


def _expand(axes: Axes, node: fx.Node) -> list[Dim]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims, sizes, shape = axes.dims(source), shape_of(source), shape_of(node)
    new = shape[: len(shape) - len(dims)]
    out: list[Dim] = [[Atom(s)] for s in new]
    for i, (dim, after) in enumerate(zip(dims, shape[len(new) :], strict=True)):
        if sizes[i] == after:
            out.append(dim)
            continue
        out.append([Atom(after)])
        if i and isinstance(sizes[i - 1], int) and sizes[i - 1] != 1:
            pin([out[-1]], "query heads that share a key and a value go together")
    return out


def _index(axes: Axes, node: fx.Node) -> list[Dim]:
    """A look-up along one dimension, such as a table of position biases."""
    indices: Any = node.args[1]
    dims = axes.dims(node.args[0])
    named = [i for i, index in enumerate(indices) if index is not None]
    if len(named) != 1 or not isinstance(node.args[0], fx.Node):
        return _unknown(axes, node)
    at = named[0]
    pin([dims[at]], f"it is looked up ({node.name})")
    return [*dims[:at], *axes.dims(indices[at]), *dims[at + 1 :]]


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
    if shape_of(source)[at] != shape_of(node)[at]:
        size, start = shape_of(source)[at], argument(node, 2, "start")
        if shape_of(node)[at] == 1 and isinstance(size, int) and isinstance(start, int):
            tie([dims[at]], f"a part of it is sliced out ({node.name})")
            axes.picks[node.name] = start % size
            dims[at] = [Atom(1)]
            return dims
        pin([dims[at]], f"a part of it is sliced out ({node.name})")
        dims[at] = [Atom(shape_of(node)[at])]
        pin([dims[at]], f"it was sliced out ({node.name})")
    return dims


def _reduce(axes: Axes, node: fx.Node) -> list[Dim]:
    """Mean, sum, max, norm over dimensions: those are pinned, the others pass."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    over: Any = argument(node, 2 if op_name(node) == "linalg_vector_norm" else 1, "dim")
    dims = axes.dims(source)
    indices = over if isinstance(over, (list, tuple)) else [over]
    if not all(isinstance(i, int) for i in indices):
        return _unknown(axes, node)
    gone = {int(i) % len(dims) for i in indices}
    if _is_mean_square(node, source) and gone == {len(dims) - 1}:
        mark([dims[-1]], NORMED)
    else:
        pin([dims[i] for i in gone], f"it is reduced ({node.name})")
    kept = [d for i, d in enumerate(dims) if i not in gone]
    if len(kept) == len(shape_of(node)):
        return kept
    return [[Atom(1)] if i in gone else d for i, d in enumerate(dims)]


def _is_mean_square(node: fx.Node, source: fx.Node) -> bool:
    """Whether a mean is that of an RMS normalisation: of squares, for `rsqrt(mean + eps)` alone."""
    if op_name(node) != "mean" or op_name(source) != "pow" or source.args[1] != 2:
        return False
    return all(
        op_name(u) == "add" and all(op_name(v) == "rsqrt" for v in u.users) for u in node.users
    )


def _positions(axes: Axes, node: fx.Node) -> list[Dim]:
    """Pooling, resampling: each channel alone, over positions that get other sizes."""
    dims = axes.dims(node.args[0])
    out = _fresh(node)
    spatial = 1 if op_name(node).endswith("1d") else 2
    lead = len(dims) - spatial
    pin([*dims[lead:], *out[lead:]], "it is a position")
    return [*dims[:lead], *out[lead:]]


def _pad(axes: Axes, node: fx.Node) -> list[Dim]:
    """Padding joins indices that no parameter owns to the ends of a dimension."""
    widths: Any = node.args[1]
    dims = list(axes.dims(node.args[0]))
    for i in range(len(widths) // 2):
        ends = widths[2 * i : 2 * i + 2]
        at = len(dims) - 1 - i
        if list(ends) == [0, 0]:
            continue
        if not all(isinstance(e, int) and e >= 0 for e in ends) or not is_concrete(dims[at]):
            fresh: Dim = [Atom(shape_of(node)[at])]
            pin([dims[at], fresh], f"it is padded ({node.name})")
            dims[at] = fresh
            continue
        around: list[Dim] = [[Atom(e)] for e in ends]
        pin(around, f"it is padding ({node.name})")
        parts = [around[0], dims[at], around[1]]
        dims[at] = concatenated([p for p, e in zip(parts, (ends[0], 1, ends[1]), strict=True) if e])
    return dims


def _cat(axes: Axes, node: fx.Node) -> list[Dim]:
    sources: Any = node.args[0]
    at = int(argument(node, 1, "dim", 0)) % len(shape_of(node))
    tensors = [axes.dims(s) for s in sources]
    dims = list(tensors[0])
    for other in tensors[1:]:
        for i, dim in enumerate(other):
            if i != at:
                unify(dims[i], dim, where=node.name)
    ends = [t[at] for t in tensors]
    if all(is_concrete(d) for d in ends):
        dims[at] = concatenated(ends)
    else:
        dims[at] = [Atom(shape_of(node)[at])]
        pin([*ends, dims[at]], f"it is joined along ({node.name})")
    return dims


def _stack(axes: Axes, node: fx.Node) -> list[Dim]:
    sources: Any = node.args[0]
    at = int(argument(node, 1, "dim", 0)) % len(shape_of(node))
    dims = list(axes.dims(sources[0]))
    for other in sources[1:]:
        for own, dim in zip(dims, axes.dims(other), strict=True):
            unify(own, dim, where=node.name)
    fresh: Dim = [Atom(len(sources))]
    pin([fresh], f"it is stacked ({node.name})")
    dims.insert(at, fresh)
    return dims


def _getitem(axes: Axes, node: fx.Node) -> list[Dim]:
    source, index = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    if source.name in axes.choices and index == 1:
        axes.chosen[node.name] = axes.choices[source.name]
    return axes.many[source.name][index]


def _split(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    """Cut a dimension in pieces. Pieces of one size, as `chunk` gives, stay of one size."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    values = node.meta["val"]
    at = int(argument(node, 2, "dim", 0)) % len(shape_of(source))
    dims = axes.dims(source)
    sizes = [_sizes(v)[at] for v in values]
    pieces = None
    if all(isinstance(s, int) for s in sizes) and is_concrete(dims[at]):
        pieces = carve(dims[at], [int(s) for s in sizes])
    if pieces is None:
        return _opaque(axes, node)
    if op_name(node) != "split_with_sizes" and len(set(sizes)) > 1:
        pin(pieces, f"it is cut into unequal parts ({node.name})")
    for piece, size in zip(pieces[1:], sizes[1:], strict=True):
        if size == sizes[0]:
            unify(pieces[0], piece, where=node.name)
    return [[*dims[:at], piece, *dims[at + 1 :]] for piece in pieces]


def _topk(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    """The largest along a dimension, and which they are."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims, count = axes.dims(source), argument(node, 1, "k")
    at = int(argument(node, 2, "dim", -1)) % len(dims)
    if not isinstance(count, int) or not argument(node, 3, "largest", True):
        return _opaque(axes, node)
    tie([dims[at]], f"the largest of it are chosen ({node.name})")
    taken: Dim = [Atom(count)]
    pin([taken], f"it is a choice ({node.name})")
    axes.choices[node.name] = dims[at]
    return [[*dims[:at], taken, *dims[at + 1 :]]] * 2


def _scatter(axes: Axes, node: fx.Node) -> list[Dim]:
    """Values written where indices say, of which is known what they are indices of."""
    into, along, index = (argument(node, i, n) for i, n in enumerate(("self", "dim", "index")))
    values = argument(node, 3, "src")
    known = getattr(index, "name", "") in axes.chosen and isinstance(values, fx.Node)
    if not known or node.kwargs:
        return _unknown(axes, node)
    dims, at = axes.dims(into), int(along) % len(axes.dims(into))
    unify(dims[at], axes.chosen[index.name], where=node.name)
    for i, dim in enumerate(axes.dims(index)):
        unify(dim, axes.dims(values)[i], where=node.name)
        if i != at:
            unify(dims[i], dim, where=node.name)
    return dims


def _native_batch_norm(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    return [_batch_norm(axes, node), [], []]


def _unbind(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    dims = list(axes.dims(node.args[0]))
    gone = dims.pop(int(argument(node, 1, "dim", 0)))
    pin([gone], f"its indices are taken apart ({node.name})")
    return [dims for _ in node.meta["val"]]


Rule = Callable[[Axes, fx.Node], list[Dim]]
Several = Callable[[Axes, fx.Node], list[list[Dim]]]

_ELEMENTWISE = """
    gelu relu silu tanh sigmoid erf exp log sqrt rsqrt neg abs pow hardswish
    hardsigmoid elu selu celu leaky_relu mish softplus relu6 hardtanh clamp
    clamp_min clamp_max square reciprocal logsigmoid
    add sub mul div rsub maximum minimum where masked_fill
    eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
    __and__ __or__ dropout feature_dropout contiguous clone detach alias to
    _to_copy float lift_fresh_copy nan_to_num isnan cos sin round floor ceil sign
    multiply subtract divide true_divide expand_as
""".split()
_POOLS = """
    max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_max_pool1d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d
    upsample_bilinear2d upsample_bicubic2d _adaptive_avg_pool2d
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_POOLS, _positions),
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "flatten", "unflatten"], _view),
    **dict.fromkeys(["reshape_as", "view_as"], _view_as),
    **dict.fromkeys(["transpose", "t"], _transpose),
    **dict.fromkeys(["softmax", "_softmax", "log_softmax"], _softmax),
    **dict.fromkeys(["cumsum", "flip", "roll"], _along),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "linalg_vector_norm"], _reduce),
    **dict.fromkeys(["matmul", "bmm"], _matmul),
    **dict.fromkeys(["arange", "linspace", "eye"], _counting),
    **dict.fromkeys([*CREATED, "scalar_tensor"], _constant),
    **dict.fromkeys(["linear", "addmm", "mm"], _linear),
    **dict.fromkeys(
        ["conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"],
        _convolution,
    ),
    "type_as": _same,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "scaled_dot_product_attention": _attention,
    "layer_norm": _layer_norm,
    "prelu": _prelu,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "scatter": _scatter,
    "index": _index,
    "select": _select,
    "slice": _slice,
    "pad": _pad,
    "cat": _cat,
    "stack": _stack,
    "getitem": _getitem,
}
SEVERAL: dict[str, Several] = {
    **dict.fromkeys(["split", "chunk", "split_with_sizes"], _split),
    "unbind": _unbind,
    "topk": _topk,
    "_native_batch_norm_legit_no_training": _native_batch_norm,
}
