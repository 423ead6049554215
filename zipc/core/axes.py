"""How large the axes of a graph's inputs are, by their names."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence

from zipc.core.errors import UsageError
from zipc.core.types import Workload

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def shape_of(name: str, dims: Sequence[int | str | None], workload: Workload) -> tuple[int, ...]:
    """The shape of an input whose axes are numbers or names.

    An input that the workload names has exactly the shape given there. Elsewhere, an axis has the
    size the workload has for its name, also in an expression of names; under any other name a
    symbolic first axis is the batch, and the rest the sequence.

    Raises:
        UsageError: the workload does not say how large it is, or says what the graph cannot take.
    """
    given = workload.input_shapes.get(name)
    if given is None:
        return tuple(_size(name, dim, axis, workload) for axis, dim in enumerate(dims))
    fixed = [n for n, dim in zip(given, dims, strict=False) if isinstance(dim, int) and n != dim]
    if len(given) != len(dims) or fixed:
        raise UsageError(
            f"The workload gives input {name!r} the shape {list(given)}, but the graph takes "
            f"{list(dims)}. Compile the model for that shape with --input-shapes."
        )
    return given


def _size(name: str, dim: int | str | None, axis: int, workload: Workload) -> int:
    if isinstance(dim, int):
        return dim
    size = None if dim is None else size_of(dim, workload.axes)
    if size is None:
        size = workload.batch_size if axis == 0 else workload.sequence_length
    if size is None:
        raise UsageError(
            f"Axis {axis} of input {name!r} ({dim or 'unnamed'}) is open, and the workload "
            f"({workload}) does not say how large it is. Give --input-shapes."
        )
    return size


def size_of(expression: str, axes: Mapping[str, int]) -> int | None:
    """A size such as "batch", "4*batch" or "past + 1"; None where a name in it is unknown."""
    try:
        return _value(ast.parse(expression, mode="eval").body, axes)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


def _value(node: ast.expr, axes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return axes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, axes), _value(node.right, axes))
    raise KeyError(ast.dump(node))
