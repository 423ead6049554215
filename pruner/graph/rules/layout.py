"""Views, permutations, slices, joins and reductions: what moves dimensions about."""

from __future__ import annotations

from typing import Any

from torch import fx

from zipc.pruner.graph.axes import (
    Atom,
    Dim,
    carve,
    concatenated,
    flatten,
    is_concrete,
    mark,
    pin,
    take,
    tie,
    unify,
)
from zipc.pruner.graph.rules.state import (
    NORMED,
    Axes,
    argument,
    fresh,
    opaque,
    shape_of,
    sizes_of,
    unknown,
)
from zipc.pruner.graph.trace import op_name


def view(axes: Axes, node: fx.Node) -> list[Dim]:
    """Regroup atoms: the flat sequence of atoms is unchanged, only the brackets move."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    pool = flatten([atom for dim in axes.dims(source) for atom in dim])
    out: list[Dim] = []
    for size in shape_of(node):
        taken = take(pool, size)
        if taken is None:
            return unknown(axes, node)
        out.append(taken if taken else [Atom(1)])
    return out


def view_as(axes: Axes, node: fx.Node) -> list[Dim]:
    """A view that is given its shape by another tensor."""
    out = view(axes, node)
    for own, other in zip(out, axes.dims(node.args[1]), strict=True):
        unify(own, other, where=node.name)
    return out


def permute(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = axes.dims(node.args[0])
    order: Any = node.args[1]
    return [dims[int(i)] for i in order]


def transpose(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = list(axes.dims(node.args[0]))
    if len(node.args) == 1:  # aten.t
        return dims[::-1]
    i, j = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
    dims[i], dims[j] = dims[j], dims[i]
    return dims


def unsqueeze(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = list(axes.dims(node.args[0]))
    at = int(node.args[1])  # type: ignore[arg-type]
    dims.insert(at if at >= 0 else len(dims) + 1 + at, [Atom(1)])
    return dims


def squeeze(axes: Axes, node: fx.Node) -> list[Dim]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims, sizes = axes.dims(source), shape_of(source)
    over: Any = node.args[1] if len(node.args) > 1 else range(len(dims))
    named = {int(i) % len(dims) for i in ([over] if isinstance(over, int) else over)}
    for at in named:
        if sizes[at] != 1:
            pin([dims[at]], f"it would vanish at size one ({node.name})")
    kept = [d for i, d in enumerate(dims) if not (i in named and sizes[i] == 1)]
    return kept if len(kept) == len(shape_of(node)) else unknown(axes, node)


def expand(axes: Axes, node: fx.Node) -> list[Dim]:
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


def index_(axes: Axes, node: fx.Node) -> list[Dim]:
    """A look-up along one dimension, such as a table of position biases."""
    indices: Any = node.args[1]
    dims = axes.dims(node.args[0])
    named = [i for i, index in enumerate(indices) if index is not None]
    if len(named) != 1 or not isinstance(node.args[0], fx.Node):
        return unknown(axes, node)
    at = named[0]
    pin([dims[at]], f"it is looked up ({node.name})")
    return [*dims[:at], *axes.dims(indices[at]), *dims[at + 1 :]]


def select(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = list(axes.dims(node.args[0]))
    gone = dims.pop(int(node.args[1]))  # type: ignore[arg-type]
    pin([gone], f"one index of it is selected ({node.name})")
    return dims


def slice_(axes: Axes, node: fx.Node) -> list[Dim]:
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


def reduce(axes: Axes, node: fx.Node) -> list[Dim]:
    """Mean, sum, max, norm over dimensions: those are pinned, the others pass."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    over: Any = argument(node, 2 if op_name(node) == "linalg_vector_norm" else 1, "dim")
    dims = axes.dims(source)
    indices = over if isinstance(over, (list, tuple)) else [over]
    if not all(isinstance(i, int) for i in indices):
        return unknown(axes, node)
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


def positions(axes: Axes, node: fx.Node) -> list[Dim]:
    """Pooling, resampling: each channel alone, over positions that get other sizes."""
    dims = axes.dims(node.args[0])
    out = fresh(node)
    spatial = 1 if op_name(node).endswith("1d") else 2
    lead = len(dims) - spatial
    pin([*dims[lead:], *out[lead:]], "it is a position")
    return [*dims[:lead], *out[lead:]]


def pad(axes: Axes, node: fx.Node) -> list[Dim]:
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


def cat(axes: Axes, node: fx.Node) -> list[Dim]:
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


def stack(axes: Axes, node: fx.Node) -> list[Dim]:
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


def getitem(axes: Axes, node: fx.Node) -> list[Dim]:
    source, index = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    if source.name in axes.choices and index == 1:
        axes.chosen[node.name] = axes.choices[source.name]
    return axes.many[source.name][index]


def split(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    """Cut a dimension in pieces. Pieces of one size, as `chunk` gives, stay of one size."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    values = node.meta["val"]
    at = int(argument(node, 2, "dim", 0)) % len(shape_of(source))
    dims = axes.dims(source)
    sizes = [sizes_of(v)[at] for v in values]
    pieces = None
    if all(isinstance(s, int) for s in sizes) and is_concrete(dims[at]):
        pieces = carve(dims[at], [int(s) for s in sizes])
    if pieces is None:
        return opaque(axes, node)
    if op_name(node) != "split_with_sizes" and len(set(sizes)) > 1:
        pin(pieces, f"it is cut into unequal parts ({node.name})")
    for piece, size in zip(pieces[1:], sizes[1:], strict=True):
        if size == sizes[0]:
            unify(pieces[0], piece, where=node.name)
    return [[*dims[:at], piece, *dims[at + 1 :]] for piece in pieces]


def topk(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    """The largest along a dimension, and which they are."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims, count = axes.dims(source), argument(node, 1, "k")
    at = int(argument(node, 2, "dim", -1)) % len(dims)
    if not isinstance(count, int) or not argument(node, 3, "largest", True):
        return opaque(axes, node)
    tie([dims[at]], f"the largest of it are chosen ({node.name})")
    taken: Dim = [Atom(count)]
    pin([taken], f"it is a choice ({node.name})")
    axes.choices[node.name] = dims[at]
    return [[*dims[:at], taken, *dims[at + 1 :]]] * 2


def scatter(axes: Axes, node: fx.Node) -> list[Dim]:
    """Values written where indices say, of which is known what they are indices of."""
    into, along, index = (argument(node, i, n) for i, n in enumerate(("self", "dim", "index")))
    values = argument(node, 3, "src")
    known = getattr(index, "name", "") in axes.chosen and isinstance(values, fx.Node)
    if not known or node.kwargs:
        return unknown(axes, node)
    dims, at = axes.dims(into), int(along) % len(axes.dims(into))
    unify(dims[at], axes.chosen[index.name], where=node.name)
    for i, dim in enumerate(axes.dims(index)):
        unify(dim, axes.dims(values)[i], where=node.name)
        if i != at:
            unify(dims[i], dim, where=node.name)
    return dims


def gather(axes: Axes, node: fx.Node) -> list[Dim]:
    """Values at indices along one dimension, row by row of all others."""
    source, at, index = node.args[0], node.args[1], node.args[2]
    assert isinstance(source, fx.Node)
    x, rows = axes.dims(source), axes.dims(index)
    at %= len(x)  # type: ignore[operator]
    pin([x[at]], f"its values are read by index ({node.name})")  # type: ignore[index]
    sizes = zip(shape_of(source), shape_of(node), strict=True)
    for i, (size, taken) in enumerate(sizes):
        if i != at and size == taken:
            unify(x[i], rows[i], where=node.name)
        elif i != at:
            pin([x[i], rows[i]], f"some of it is read by index ({node.name})")
    return rows


def unbind(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    dims = list(axes.dims(node.args[0]))
    gone = dims.pop(int(argument(node, 1, "dim", 0)))
    pin([gone], f"its indices are taken apart ({node.name})")
    return [dims for _ in node.meta["val"]]
