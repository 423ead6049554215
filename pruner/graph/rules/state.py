"""What is known of the dimensions of a program, and what every rule needs to read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from zipc.pruner.graph.axes import Atom, Dim, Size, pin
from zipc.pruner.graph.trace import MapCall, Program, op_name

RESIDUAL, HEADS, GROUPED, NORMED = "residual", "heads", "grouped", "normed"


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

    def dims(self, node: Any) -> list[Dim]:
        return self.of.get(node.name, []) if isinstance(node, fx.Node) else []


def shape_of(node: fx.Node) -> list[Size]:
    return sizes_of(node.meta["val"])


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of an ATen call, given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def sizes_of(value: torch.Tensor) -> list[Size]:
    return [s if isinstance(s, int) else str(s) for s in value.shape]


def fresh(node: fx.Node) -> list[Dim]:
    return [[Atom(s)] for s in shape_of(node)]


def unknown(axes: Axes, node: fx.Node, reason: str | None = None) -> list[Dim]:
    """An op nobody described, or not followed for a `reason`: all it touches keeps its size."""
    out = fresh(node)
    reason = reason or f"op {op_name(node)} ({node.name}) is not understood"
    for source in node.all_input_nodes:
        pin(axes.dims(source), reason)
    pin(out, reason)
    return out


def opaque(axes: Axes, node: fx.Node) -> list[list[Dim]]:
    """Top-k and others that return several tensors."""
    reason = f"op {op_name(node)} ({node.name}) takes it apart"
    pin([d for source in node.all_input_nodes for d in axes.dims(source)], reason)
    results = [
        [[Atom(s)] for s in sizes_of(v)] if isinstance(v, torch.Tensor) else []
        for v in node.meta["val"]
    ]
    for dims in results:
        pin(dims, reason)
    return results


def counting(axes: Axes, node: fx.Node) -> list[Dim]:
    """A fresh tensor whose values depend on its size (arange): its dimensions are fixed."""
    out = fresh(node)
    pin(out, f"it is created with a fixed size ({node.name})")
    return out


def constant(axes: Axes, node: fx.Node) -> list[Dim]:
    """A fresh tensor of one value: as good at any other size."""
    return fresh(node)


def same(axes: Axes, node: fx.Node) -> list[Dim]:
    """The dimensions of the first argument, whatever the others are for."""
    return list(axes.dims(node.args[0]))
