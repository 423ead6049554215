"""Trace a module into a flat graph of ATen operations with named parameters."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from zipc.core.errors import UnsupportedModel
from zipc.core.quiet import hush
from zipc.pruner.graph.decompose import TABLE, as_splits_, decomposes

# What stands on the stack of an error beside the code of the model.
_PYTHON = Path(traceback.__file__).parent
_OWN = (Path(torch.__file__).parent, Path(__file__).parent)
# Modules whose whole forward pass is one map with `weight` and `bias`.
MAP_MODULES = frozenset(
    "Linear Conv1D Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d".split()
)


@dataclass(frozen=True, slots=True)
class MapCall:
    """One linear map or convolution in the graph: `module` is the path of the module that owns it.

    `out_dim` and `in_dim` are the dimensions of `weight` that give and contract channels; of a
    grouped map one of them holds all groups. `kernel` is the number of columns per channel.
    """

    node: str
    module: str
    weight: str
    bias: str | None
    source: str  # node name of the input
    out_dim: int = 0
    in_dim: int = 1
    kernel: int = 1
    groups: int = 1
    convolution: bool = False
    transposed: bool = False  # a transposed convolution
    window: tuple[tuple[int, int, int, int], ...] | None = ()
    # (kernel, stride, padding, dilation) of each axis; None where they do not say the output size
    fixed: bool = False  # it reads the same whatever the model reads: runtimes compute it once

    @property
    def rounds(self) -> bool:
        """Whether a product in fewer bits saves anything."""
        return self.plain and not self.fixed

    @property
    def plain(self) -> bool:
        """Whether it is a linear map, or a convolution neither grouped nor transposed."""
        return self.groups == 1 and not self.transposed


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
    maps: list[MapCall]
    fixed: dict[str, str] = field(default_factory=dict)  # tensor that must keep its size -> why
    caches: frozenset[str] = frozenset()  # inputs that follow what is pruned, and may be missing
    kept: list[fx.Node] = field(default_factory=list)  # what goes into a cache: no output
    kinds: dict[str, str] = field(default_factory=dict)  # path -> class that a module's code is of
    refused: str = ""  # why torch.export did not follow the code; torch.fx then did

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
    least: Mapping[str, int] | None = None,
) -> Program:
    """Export `model` on `example`, given by keyword; the axes named in `dynamic` stay symbolic.

    An axis may be named as a sum, as in "past+1" or "past+sequence". `limits` gives the largest
    size of a named axis, `least` the smallest.

    What torch.export does not follow, such as a branch on the value of a buffer, torch.fx may.

    Raises:
        UnsupportedModel: neither can follow the module; names the reason.
    """
    limits = limits or {}
    names = dict.fromkeys(name for axes in dynamic.values() for name in axes.values())
    dims = {
        name: torch.export.Dim(name, min=(least or {}).get(name), max=limits.get(name))
        for name in names
        if "+" not in name
    }
    for name in names:
        root, _, more = name.partition("+")
        if more:  # torch takes no sum of two axes: it finds that out from the code
            dims[name] = dims[root] + int(more) if more.isdigit() else torch.export.Dim.AUTO
    shapes = {k: {i: dims[n] for i, n in dynamic.get(k, {}).items()} for k in example}
    refused = ""
    try:
        exported = _export(model, example, shapes)
    except Exception as error:  # torch.export raises many unrelated types
        refused = f"{_reason(error).rstrip('.')}{_place(error)}"
        followed = _symbolic(model)
        try:
            if followed is None:
                raise
            exported = _export(followed, example, shapes)
        except Exception:
            raise UnsupportedModel(
                f"{type(model).__name__} cannot be traced by torch.export: {refused}. Rewrite that "
                "with operations on tensors, such as torch.where in place of a branch."
            ) from error
    program = program_of(exported)
    program.refused = refused
    program.fixed |= _tied(model)
    program.kinds = {path: _code_of(module) for path, module in model.named_modules()}
    return program


def _export(
    model: nn.Module, example: Mapping[str, Tensor], shapes: dict[str, Any]
) -> torch.export.ExportedProgram:
    with torch.no_grad(), hush():
        exported = torch.export.export(
            model, (), kwargs=dict(example), dynamic_shapes=shapes, strict=False
        )
        if any(_in_place(node) or decomposes(node) for node in exported.graph.nodes):
            # the same operations, none in place, but for those that the rules follow as others
            exported = exported.run_decompositions(dict(TABLE))
        as_splits_(exported.graph)
    return exported


def _symbolic(model: nn.Module) -> nn.Module | None:
    """What torch.fx makes of a module, which reads the values of buffers; None where it fails."""
    try:
        with torch.no_grad(), hush():
            return fx.symbolic_trace(model)
    except Exception:  # the error of torch.export says more
        return None


def _reason(error: Exception) -> str:
    """The first line of what torch says, and what it found where it lists that below."""
    if isinstance(error, GuardOnDataDependentSymNode):  # which names symbols of torch's own
        return "the code depends on the value of a tensor"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    found = [line.removeprefix("- ") for line in lines[1:] if line.startswith("- ")]
    first = [line.partition(" For more information")[0] for line in lines[:1]]
    found = [line.partition(" If you're using")[0] for line in found]  # torch's own interface
    return f"{type(error).__name__}: {' '.join([*first, *found[:1]])}"


def _place(error: Exception) -> str:
    """The last line of the model's own code that led to an error."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.line
        and Path(frame.filename).parent != _PYTHON
        and not any(Path(frame.filename).is_relative_to(own) for own in _OWN)
    ]
    return "".join(f" ({Path(f.filename).name}, line {f.lineno}: {f.line})" for f in frames[-1:])


def _in_place(node: fx.Node) -> bool:
    name = op_name(node)
    return name.endswith("_") and not name.startswith("_")


def _code_of(module: nn.Module) -> str:
    """Name of the class whose `forward` a module runs: a subclass may have none of its own."""
    return next(c.__name__ for c in type(module).__mro__ if "forward" in vars(c))


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
    moving = _moving(nodes, tensors)
    maps = [
        replace(call, fixed=call.source not in moving)
        for node in nodes
        if (call := _map_call(node, tensors)) is not None
    ]
    return Program(exported, nodes, tensors, inputs, outputs, maps, fixed)


def _moving(nodes: Sequence[fx.Node], tensors: Collection[str]) -> set[str]:
    """Names of the nodes that depend on an input, or its size."""
    found: set[str] = set()
    for node in nodes:
        given = node.op == "placeholder" and node.name not in tensors
        if given or any(source.name in found for source in node.all_input_nodes):
            found.add(node.name)
    return found


def op_name(node: fx.Node) -> str:
    """The bare name of a node's operation, such as `conv2d`."""
    if isinstance(node.target, str) or node.op != "call_function":
        return ""
    named = str(node.target)
    if named.startswith("aten."):
        return named.removeprefix("aten.").split(".")[0]
    return str(getattr(node.target, "__name__", named))


_LINEAR = {"linear": (1, 0, 2), "addmm": (2, 1, 0), "mm": (1, 0, None), "matmul": (1, 0, None)}
_CONVOLUTIONS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)


def _map_call(node: fx.Node, tensors: Mapping[str, tuple[str, Tensor]]) -> MapCall | None:
    """What a node computes, if it is a map with a parameter as weight."""
    op = op_name(node)
    if op not in _LINEAR and op not in _CONVOLUTIONS:
        return None
    places = _LINEAR.get(op, (1, 0, 2))
    weight_node, source = node.args[places[0]], node.args[places[1]]
    weight = tensors.get(getattr(weight_node, "name", ""))
    if weight is None or not isinstance(source, fx.Node) or source.name in tensors:
        return None
    bias_node = None
    if places[2] is not None and len(node.args) > places[2]:
        bias_node = node.args[places[2]]
    bias = tensors.get(getattr(bias_node, "name", ""))
    if isinstance(bias_node, fx.Node) and bias is None:
        return None
    name, value = weight
    names = (node.name, name.rpartition(".")[0], name, bias[0] if bias else None, source.name)
    if op == "linear":
        return MapCall(*names)
    if op in _LINEAR:
        return MapCall(*names, out_dim=1, in_dim=0) if value.dim() == 2 else None
    transposed = "transpose" in op
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return MapCall(
        *names,
        out_dim=1 if transposed else 0,
        in_dim=0 if transposed else 1,
        kernel=1 if transposed else value[0, 0].numel(),
        groups=int(groups),  # type: ignore[arg-type]
        convolution=True,
        transposed=transposed,
        window=None if transposed else _window(node, value),
    )


def _window(node: fx.Node, weight: Tensor) -> tuple[tuple[int, int, int, int], ...] | None:
    kernel = [int(k) for k in weight.shape[2:]]
    axes = len(kernel)

    def each(place: int, name: str, default: int) -> list[int] | None:
        value: Any = node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
        if value == "same":
            spans = [d * (k - 1) for k, d in zip(kernel, each(5, "dilation", 1) or [], strict=True)]
            return None if any(span % 2 for span in spans) else [span // 2 for span in spans]
        if value == "valid":
            value = 0
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return values if len(values) == axes else values * axes

    parts = each(3, "stride", 1), each(4, "padding", 0), each(5, "dilation", 1)
    stride, padding, dilation = parts
    if stride is None or padding is None or dilation is None:
        return None
    return tuple(zip(kernel, stride, padding, dilation, strict=True))
