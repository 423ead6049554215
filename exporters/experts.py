"""A mixture of experts that computes, for every expert, only the tokens it was chosen for."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from zipc.exporters.fusions import Finder
from zipc.exporters.graph import OnnxGraph, attribute, node
from zipc.exporters.shapes import constant_

# operators that treat every token by itself
_ROWWISE = frozenset(
    ("Add", "Clip", "Div", "Erf", "Gelu", "Mul", "Relu", "Sigmoid", "Split", "Sub", "Tanh")
)


@dataclass(frozen=True, slots=True)
class _Mixture:
    """sum over e of weights[e] * (f(tokens first[e]) second[e]), as it stands in the graph."""

    tokens: str  # (tokens, in)
    weights: str  # (experts, tokens), 0 where an expert was not chosen
    firsts: dict[str, str]  # product with the stacked matrices -> those matrices (experts, in, out)
    between: list[NodeProto]  # what makes the inputs of the second product, in order
    inner: str
    second: str  # (experts, inner, out)
    result: str


def sparse_experts_(graph: OnnxGraph) -> None:
    """Gather the tokens of each expert, send them through its own matrices and add them up.

    As traced, all experts see all tokens and most products are multiplied by 0. What is left is
    the work of the chosen ones, and the matrices of an expert that no token chose are not read.
    """
    find = Finder(graph)
    for last in [n for n in graph.nodes if n.op_type == "ReduceSum"]:
        mixture = _mixture(find, last)
        if mixture is not None:
            graph.nodes = [n for n in graph.nodes if n is not last]
            _write_(graph, find, mixture)


def _mixture(find: Finder, last: NodeProto) -> _Mixture | None:
    """The mixture that ends in a sum over experts, if there is one."""
    weighted = find.made_by(last.input[0], "Mul")
    if len(last.input) < 2 or find.numbers(last.input[1]) != [0] or weighted is None:
        return None
    if attribute(last, "keepdims", 1) != 0:
        return None
    for value, factor in (tuple(weighted.input), tuple(reversed(weighted.input))):
        product, opened = find.made_by(value, "MatMul"), find.made_by(factor, "Unsqueeze")
        if product is None or opened is None or _stack(find, product.input[1]) is None:
            continue
        shape = find.graph.shapes.get(opened.output[0], [])
        if len(shape) != 3 or shape[2] != 1 or find.numbers(opened.input[1]) not in ([-1], [2]):
            continue
        region = _between(find, product.input[0])
        if region is None:
            continue
        firsts, between, tokens = region
        return _Mixture(
            tokens,
            opened.input[0],
            firsts,
            between,
            product.input[0],
            product.input[1],
            last.output[0],
        )
    return None


def _between(find: Finder, inner: str) -> tuple[dict[str, str], list[NodeProto], str] | None:
    """From the input of the second product up to the first ones: those, the nodes, the tokens."""
    firsts: dict[str, str] = {}
    between: list[NodeProto] = []
    tokens: set[str] = set()

    def climb(value: str) -> bool:
        made = find.producers.get(value)
        if value in firsts or any(made is n for n in between):
            return True
        if made is None:
            return find.scalar(value) is not None
        if made.op_type == "MatMul" and _stack(find, made.input[1]) is not None:
            firsts[value] = made.input[1]
            tokens.add(made.input[0])
            return True
        if made.op_type not in _ROWWISE:
            return False
        sources = made.input[:1] if made.op_type == "Split" else [i for i in made.input if i]
        if made.op_type == "Split" and attribute(made, "axis", 0) not in (-1, 2):
            return False
        if not all(climb(s) for s in sources):
            return False
        between.append(made)
        return True

    if not climb(inner) or len(tokens) != 1:
        return None
    (source,) = tokens
    opened = find.made_by(source, "Unsqueeze")  # for all experts alike
    if opened is not None and find.numbers(opened.input[1]) == [0]:
        source = opened.input[0]
    return (firsts, between, source) if len(find.graph.shapes.get(source, [])) == 2 else None


def _stack(find: Finder, value: str) -> tuple[str, bool] | None:
    """(initialiser, whether its last axes are swapped) of a stack of matrices."""
    turned = find.made_by(value, "Transpose")
    if turned is not None and attribute(turned, "perm", []) != [0, 2, 1]:
        return None
    name = value if turned is None else turned.input[0]
    held = find.graph.arrays.get(name)
    return None if held is None or held.ndim != 3 else (name, turned is not None)


def _matrices_(graph: OnnxGraph, find: Finder, stack: str) -> list[str]:
    """One initialiser for each matrix of a stack."""
    found = _stack(find, stack)
    assert found is not None
    name, turned = found
    names = []
    for number, matrix in enumerate(graph.arrays[name]):
        names.append(f"{name}.{number}")
        graph.arrays[names[-1]] = matrix.T if turned else matrix
    return names


def _write_(graph: OnnxGraph, find: Finder, mixture: _Mixture) -> None:
    """Emit the tokens of one expert after the other; each adds to what the others made."""
    firsts = {value: _matrices_(graph, find, stack) for value, stack in mixture.firsts.items()}
    seconds = _matrices_(graph, find, mixture.second)
    stem = mixture.result
    count, shape, total = f"{stem}_tokens", f"{stem}_shape", f"{stem}_none"
    width = int(graph.arrays[seconds[0]].shape[1])
    graph.nodes += [
        node("Shape", [mixture.tokens], [count], start=0, end=1),
        node("Concat", [count, constant_(graph, [width])], [shape], axis=0),
        node("ConstantOfShape", [shape], [total]),
    ]
    for expert, second in enumerate(seconds):
        own = f"{stem}_{expert}"
        at = constant_(graph, [expert])
        graph.nodes += [
            node("Gather", [mixture.weights, at], [f"{own}_row"], axis=0),
            node("Reshape", [f"{own}_row", constant_(graph, [-1])], [f"{own}_weights"]),
            node("NonZero", [f"{own}_weights"], [f"{own}_found"]),
            node("Transpose", [f"{own}_found"], [f"{own}_places"], perm=[1, 0]),
            node("GatherND", [mixture.tokens, f"{own}_places"], [f"{own}_tokens"]),
        ]
        names = {value: f"{own}/{value}" for value in firsts}
        for value, matrices in firsts.items():
            inputs = [f"{own}_tokens", matrices[expert]]
            graph.nodes.append(node("MatMul", inputs, [names[value]]))
        for old in mixture.between:
            names |= {o: f"{own}/{o}" for o in old.output}
            graph.nodes.append(_copied(old, names))
        result = mixture.result if expert == len(seconds) - 1 else f"{own}_sum"
        graph.nodes += [
            node("MatMul", [names[mixture.inner], second], [f"{own}_made"]),
            node("GatherND", [f"{own}_weights", f"{own}_places"], [f"{own}_chosen"]),
            node("Unsqueeze", [f"{own}_chosen", constant_(graph, [1])], [f"{own}_factor"]),
            node("Mul", [f"{own}_made", f"{own}_factor"], [f"{own}_share"]),
            node(
                "ScatterND",
                [total, f"{own}_places", f"{own}_share"],
                [result],
                reduction="add",
            ),
        ]
        total = result


def _copied(old: NodeProto, names: dict[str, str]) -> NodeProto:
    """A node on rows of its own instead of a stack of them."""
    new = NodeProto()
    new.CopyFrom(old)
    for values in (new.input, new.output):
        for i, value in enumerate(values):
            values[i] = names.get(value, value)
    new.name = f"{new.op_type}/{new.output[0]}"
    for held in new.attribute:
        if new.op_type == "Split" and held.name == "axis":
            held.i = -1
    return new
