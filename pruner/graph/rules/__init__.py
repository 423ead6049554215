"""How each operation relates the dimensions it reads to those it gives: one rule per family.

A rule takes the dimensions of its sources and returns those of its result, unifying and pinning on
the way. What no rule describes is pinned as a whole: never a guess.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from zipc.core.nodes import editable
from zipc.pruner.graph.axes import Atom, Dim, pin
from zipc.pruner.graph.rules import elementwise, layout, maps, norms
from zipc.pruner.graph.rules.state import Axes, constant, counting, fresh, opaque, same, unknown
from zipc.pruner.graph.trace import Program, op_name

CREATED = {"zeros": 0, "ones": 0, "full": 0, "new_ones": 1, "new_zeros": 1, "new_full": 1}
Rule = Callable[[Axes, fx.Node], list[Dim]]
Several = Callable[[Axes, fx.Node], list[list[Dim]]]

_POOLS = """
    max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_max_pool1d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d
    upsample_bilinear2d upsample_bicubic2d _adaptive_avg_pool2d
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(elementwise.ELEMENTWISE, elementwise.elementwise),
    **dict.fromkeys(["max", "min"], elementwise.larger),
    **dict.fromkeys(_POOLS, layout.positions),
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "flatten", "unflatten"], layout.view),
    **dict.fromkeys(["reshape_as", "view_as"], layout.view_as),
    **dict.fromkeys(["transpose", "t"], layout.transpose),
    **dict.fromkeys(["softmax", "_softmax", "log_softmax"], elementwise.softmax),
    **dict.fromkeys(["cumsum", "flip", "roll"], elementwise.along),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "linalg_vector_norm"], layout.reduce),
    **dict.fromkeys(["matmul", "bmm"], maps.matmul),
    **dict.fromkeys(["arange", "linspace", "eye"], counting),
    **dict.fromkeys([*CREATED, "scalar_tensor"], constant),
    **dict.fromkeys(["linear", "addmm", "mm"], maps.linear),
    **dict.fromkeys(
        ["conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"],
        maps.convolution,
    ),
    "type_as": same,
    "permute": layout.permute,
    "unsqueeze": layout.unsqueeze,
    "squeeze": layout.squeeze,
    "expand": layout.expand,
    "scaled_dot_product_attention": maps.attention,
    "layer_norm": norms.layer_norm,
    "prelu": norms.prelu,
    **dict.fromkeys(["batch_norm", "instance_norm"], norms.batch_norm),
    "group_norm": norms.group_norm,
    "embedding": maps.embedding,
    "gather": layout.gather,
    "scatter": layout.scatter,
    "index": layout.index_,
    "select": layout.select,
    "slice": layout.slice_,
    "pad": layout.pad,
    "cat": layout.cat,
    "stack": layout.stack,
    "getitem": layout.getitem,
}
SEVERAL: dict[str, Several] = {
    **dict.fromkeys(["split", "chunk", "split_with_sizes"], layout.split),
    "unbind": layout.unbind,
    "topk": layout.topk,
    "_native_batch_norm_legit_no_training": norms.native_batch_norm,
}


def follow(program: Program) -> Axes:
    """The dimensions of every tensor of a program, unified and pinned as its operations ask."""
    axes = Axes(program)
    for node in program.nodes:
        if node.op == "placeholder":
            axes.of[node.name] = _given(axes, node)
        elif node.op == "call_function":
            _apply(axes, node)
    for node in program.outputs:
        pin(axes.dims(node), "it is part of the model's output")
    return axes


def _given(axes: Axes, node: fx.Node) -> list[Dim]:
    """Of a parameter, which is one tensor wherever it is read, or of an input."""
    program = axes.program
    held = program.tensor_of(node)
    if held is None:
        dims = fresh(node)
        if node.name not in program.caches:
            pin(dims, "it is part of the model's input")
        return dims
    name, value = held
    if name not in axes.parameters:
        axes.parameters[name] = [[Atom(int(s))] for s in value.shape]
        if name in program.fixed:
            pin(axes.parameters[name], program.fixed[name])
        if not editable(value):
            pin(axes.parameters[name], f"{name} holds {str(value.dtype).partition('.')[2]} values")
    return axes.parameters[name]


def _apply(axes: Axes, node: fx.Node) -> None:
    name = op_name(node)
    for source in node.all_input_nodes:
        if source.name in axes.chosen and name not in ("scatter", ""):
            pin([axes.chosen[source.name]], f"its indices are read ({node.name})")
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        axes.of[node.name] = RULES.get(name, unknown)(axes, node)
    elif isinstance(value, (list, tuple)):
        axes.many[node.name] = SEVERAL.get(name, opaque)(axes, node)
