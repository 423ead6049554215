"""Trace a module into a flat graph of ATen operations with named parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from zipc.core.errors import UnsupportedModel
from zipc.core.quiet import hush


@dataclass(frozen=True, slots=True)
class LinearCall:
    """One `aten.linear` of the graph: `module` is the path of the nn.Linear that owns it."""

    node: str
    module: str
    weight: str
    bias: str | None
    source: str  # node name of the input


@dataclass(slots=True)
class Program:
    """A traced module: `graph` in execution order; tensors by qualified name.

    `tensors` maps placeholder names to (qualified name, tensor) for parameters, buffers and
    constants; `inputs` are the names of the user's tensors, in order.
    """

    exported: torch.export.ExportedProgram
    nodes: list[fx.Node]
    tensors: dict[str, tuple[str, Tensor]]
    inputs: list[str]
    outputs: list[fx.Node]
    linears: list[LinearCall]
    fixed: dict[str, str] = field(default_factory=dict)  # tensor that must keep its size -> why

    def tensor_of(self, node: Any) -> tuple[str, Tensor] | None:
        """Qualified name and value if `node` is a parameter, buffer or constant."""
        return self.tensors.get(node.name) if isinstance(node, fx.Node) else None


Dynamic = Mapping[str, Mapping[int, str]]  # input -> axis -> name of its size


def trace(
    model: nn.Module,
    example: Mapping[str, Tensor],
    *,
    dynamic: Dynamic,
    limits: Mapping[str, int] | None = None,
) -> Program:
    """Export `model` on `example`, given by keyword; the axes named in `dynamic` stay symbolic.

    `limits` gives the largest size of a named axis.

    Raises:
        UnsupportedModel: torch.export cannot follow the module; names the reason.
    """
    limits = limits or {}
    names = dict.fromkeys(name for axes in dynamic.values() for name in axes.values())
    dims = {name: torch.export.Dim(name, max=limits.get(name)) for name in names}
    shapes = {k: {i: dims[n] for i, n in dynamic.get(k, {}).items()} for k in example}
    try:
        with torch.no_grad(), hush():
            exported = torch.export.export(
                model, (), kwargs=dict(example), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # torch.export raises many unrelated types
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be traced by torch.export: "
            f"{type(error).__name__}: {first}. Data-dependent control flow and custom ops must be "
            "rewritten or the part excluded."
        ) from error
    program = program_of(exported)
    program.fixed |= _tied(model)
    return program


def _tied(model: nn.Module) -> dict[str, str]:
    """Parameters that several modules hold: resizing one would leave the others behind."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    return {n: "its weights are tied: " + " = ".join(g) for g in names.values() if g[1:] for n in g}


def program_of(exported: torch.export.ExportedProgram) -> Program:
    signature = exported.graph_signature
    tensors: dict[str, tuple[str, Tensor]] = {}
    stored = {**exported.state_dict, **exported.constants}
    for names in (
        signature.inputs_to_parameters,
        signature.inputs_to_buffers,
        signature.inputs_to_lifted_tensor_constants,
    ):
        for placeholder, name in names.items():
            value = stored[name]
            if isinstance(value, Tensor):
                tensors[placeholder] = (name, value.detach())
    fixed = {n: "it is a buffer that no checkpoint holds" for n in signature.non_persistent_buffers}
    for name in signature.inputs_to_lifted_tensor_constants.values():
        fixed[name] = "it is a constant in the code of the model"
    nodes = list(exported.graph.nodes)
    inputs = [n for n in signature.user_inputs if isinstance(n, str)]
    by_name = {n.name: n for n in nodes}
    outputs = [by_name[n] for n in signature.user_outputs if isinstance(n, str) and n in by_name]
    linears = []
    for node in nodes:
        if node.target is torch.ops.aten.linear.default:
            weight = tensors.get(getattr(node.args[1], "name", ""))
            if weight is None:
                continue
            bias = node.args[2] if len(node.args) > 2 else None
            bias_name = tensors[bias.name][0] if isinstance(bias, fx.Node) else None
            module = weight[0].rpartition(".")[0]
            source = node.args[0]
            assert isinstance(source, fx.Node)
            linears.append(LinearCall(node.name, module, weight[0], bias_name, source.name))
    return Program(exported, nodes, tensors, inputs, outputs, linears, fixed)
