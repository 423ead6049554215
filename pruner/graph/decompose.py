"""Operations that are written as others, whose dimensions the rules can follow."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
MAPS = (aten.linear.default, aten.addmm.default)  # they give channels in their last dimension
SLICES = (aten.slice.Tensor,)


def einsum(equation: str, operands: Sequence[Tensor], *, path: Any = None) -> Tensor:
    """A product of two tensors as a matrix product: of attention's queries and keys, say.

    Of letters of one sum, one free and one contracted each side; all others go to both factors.
    """
    letters = _letters(equation, operands)
    if letters is None:
        return NotImplemented  # type: ignore[no-any-return]
    (a, b), result = letters
    both = [n for n in result if n in a and n in b]
    (row,), (column,) = ([n for n in result if n in one and n not in both] for one in (a, b))
    (summed,) = [n for n in a if n not in result]
    x, y = operands
    left, right, made = [*both, row, summed], [*both, summed, column], [*both, row, column]
    x = x.permute([a.index(n) for n in left])
    y = y.permute([b.index(n) for n in right])
    return torch.matmul(x, y).permute([made.index(n) for n in result])


def _letters(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | None:
    """The letters of two factors and of the result; None where it is no such product."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    factors = given.split(",")
    if not arrow or len(factors) != 2 or "." in equation or len(operands) != 2:
        return None
    a, b = factors
    if any(len(set(names)) != len(names) for names in (a, b, result)):
        return None
    both = {n for n in a if n in b}
    sides = [[n for n in names if n in result and n not in both] for names in factors]
    summed = [n for n in both if n not in result]
    alone = [n for n in (a + b) if n not in result and n not in both]
    fits = [len(side) for side in sides] == [1, 1] and len(summed) == 1 and not alone
    return (factors, result) if fits else None


def repeat_interleave(
    x: Tensor, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> Tensor:
    """Each head of keys and values several times, one after another."""
    if dim is None:
        return NotImplemented  # type: ignore[no-any-return]
    dim %= x.dim()
    sizes = list(x.shape)
    several = x.unsqueeze(dim + 1).expand([*sizes[: dim + 1], repeats, *sizes[dim + 1 :]])
    return several.reshape([*sizes[:dim], sizes[dim] * repeats, *sizes[dim + 1 :]])


def repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    """The whole several times, one after another: a token for every row of a batch, say."""
    x = x.reshape([1] * (len(repeats) - x.dim()) + list(x.shape))
    for dim, count in enumerate(repeats):
        sizes = list(x.shape)
        if isinstance(count, int) and count == 1:
            continue
        if sizes[dim] == 1:
            x = x.expand([*sizes[:dim], count, *sizes[dim + 1 :]])
            continue
        several = x.unsqueeze(dim).expand([*sizes[:dim], count, *sizes[dim:]])
        x = several.reshape([*sizes[:dim], count * sizes[dim], *sizes[dim + 1 :]])
    return x


def baddbmm(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A product of queries and keys, and a bias for every place."""
    return beta * x + alpha * torch.matmul(a, b)


TABLE: dict[Any, Callable[..., Tensor]] = {
    aten.einsum.default: einsum,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.repeat.default: repeat,
    aten.baddbmm.default: baddbmm,
}


def decomposes(node: fx.Node) -> bool:
    """Whether a node is one that `TABLE` may write as others."""
    return node.target in TABLE


def as_splits_(graph: fx.Graph) -> None:
    """Write slices that cut all of what a map gives into consecutive parts as one split.

    Queries, keys and values of one map are often taken apart so; what any other slice leaves out
    is not known to be of no use.
    """
    for node in list(graph.nodes):
        if node.target not in MAPS:
            continue
        last = node.meta["val"].dim() - 1
        parts = {
            ends: user
            for user in node.users
            if user.target in SLICES and (ends := _ends(user, node, last)) is not None
        }
        borders = [0, *(end for _, end in sorted(parts))]
        consecutive = list(pairwise(borders)) == sorted(parts)
        if len(parts) > 1 and consecutive and borders[-1] == _size(node, last):
            _split_(graph, node, last, [parts[ends] for ends in sorted(parts)])


def _ends(part: fx.Node, whole: fx.Node, last: int) -> tuple[int, int] | None:
    """Where a slice of the last dimension begins and ends; None of another slice."""
    defaults = [None, 0, None, None, 1]
    args = [*part.args, *defaults[len(part.args) :]]
    size = _size(whole, last)
    start, end = args[2] or 0, size if args[3] is None else args[3]
    known = all(isinstance(value, int) for value in (size, start, end))
    if part.kwargs or not known or args[1] not in (-1, last) or args[4] != 1:
        return None
    first, after = slice(start, end).indices(size)[:2]
    return (first, after) if first < after else None


def _size(node: fx.Node, dim: int) -> Any:
    return node.meta["val"].shape[dim]


def _split_(graph: fx.Graph, node: fx.Node, dim: int, parts: Sequence[fx.Node]) -> None:
    with graph.inserting_after(node):
        args = (node, [_size(part, dim) for part in parts], dim)
        made = graph.call_function(aten.split_with_sizes.default, args)
        made.meta = dict(parts[0].meta, val=[part.meta["val"] for part in parts])
    for i, part in enumerate(parts):
        with graph.inserting_after(made):
            taken = graph.call_function(operator.getitem, (made, i))
        taken.meta = dict(part.meta)
        part.replace_all_uses_with(taken)
        graph.erase_node(part)
