"""Operations element by element, and those that run along a dimension and keep it."""

from __future__ import annotations

from torch import fx

from zipc.pruner.graph.axes import Atom, Dim, mark, pin, tie, unify
from zipc.pruner.graph.rules.state import RESIDUAL, Axes, argument, shape_of, unknown
from zipc.pruner.graph.trace import op_name

ELEMENTWISE = """
    gelu relu silu tanh sigmoid erf exp log sqrt rsqrt neg abs pow hardswish
    hardsigmoid elu selu celu leaky_relu mish softplus relu6 hardtanh clamp
    clamp_min clamp_max square reciprocal logsigmoid
    add sub mul div rsub maximum minimum where masked_fill
    eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
    __and__ __or__ dropout feature_dropout contiguous clone detach alias to
    _to_copy float lift_fresh_copy nan_to_num isnan cos sin round floor ceil sign
    multiply subtract divide true_divide expand_as
""".split()


def elementwise(axes: Axes, node: fx.Node) -> list[Dim]:
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


def larger(axes: Axes, node: fx.Node) -> list[Dim]:
    """`max` and `min`: of two tensors, element by element; of one, a single number."""
    return elementwise(axes, node) if len(node.all_input_nodes) == 2 else unknown(axes, node)


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
        if op_name(at) not in ELEMENTWISE:
            if at.op == "call_function":
                found.add(at.name)
            continue
        for source in at.all_input_nodes:
            if source.name not in seen:
                seen.add(source.name)
                stack.append(source)
    return found


def softmax(axes: Axes, node: fx.Node) -> list[Dim]:
    dims = axes.dims(node.args[0])
    tie([dims[int(node.args[1])]], "a softmax runs over it")  # type: ignore[arg-type]
    return dims


def along(axes: Axes, node: fx.Node) -> list[Dim]:
    """Cumulative sums, flips and rolls: the dimension they run along keeps its indices."""
    dims = axes.dims(node.args[0])
    over = argument(node, 2 if op_name(node) == "roll" else 1, "dims", [])
    for i in [over] if isinstance(over, int) else over or range(len(dims)):
        pin([dims[i]], f"{op_name(node)} runs along it ({node.name})")
    return dims
