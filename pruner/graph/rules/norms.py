"""Normalisations, and slopes that go with channels."""

from __future__ import annotations

from torch import fx

from zipc.pruner.graph.axes import Atom, Dim, flatten, is_concrete, mark, pin, product, unify
from zipc.pruner.graph.rules.state import GROUPED, NORMED, Axes, argument, unknown
from zipc.pruner.graph.trace import op_name


def layer_norm(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = axes.dims(node.args[0])
    over = node.args[1]
    assert isinstance(over, (list, tuple))
    normed = dims[len(dims) - len(over) :]
    for source in node.args[2:4]:
        for own, dim in zip(axes.dims(source), normed, strict=False):
            unify(own, dim, where=node.name)
    mark(normed, NORMED)
    return dims


def prelu(axes: Axes, node: fx.Node) -> list[Dim]:
    """One slope for all, or one for each channel."""
    dims, (slopes,) = axes.dims(node.args[0]), axes.dims(node.args[1])
    if len(dims) > 1 and slopes:
        unify(dims[1], slopes, where=node.name)
    return dims


def batch_norm(axes: Axes, node: fx.Node) -> list[Dim]:
    """Per channel: the statistics of evaluation mode are parameters like any other, or those of
    each channel alone."""
    if op_name(node) == "batch_norm" and argument(node, 5, "training", False):
        return unknown(axes, node)
    dims = axes.dims(node.args[0])
    for source in node.args[1:5]:
        for own in axes.dims(source):
            unify(dims[1], own, where=node.name)
    return dims


def native_batch_norm(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    return [batch_norm(axes, node), [], []]


def group_norm(axes: Axes, node: fx.Node) -> list[Dim]:
    """The channels of a group are normalised together; whole groups are independent."""
    dims = axes.dims(node.args[0])
    count = int(node.args[1])  # type: ignore[arg-type]
    if not is_concrete(dims[1]):
        return unknown(axes, node)
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
