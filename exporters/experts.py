"""A mixture of experts that computes, for every expert, only the tokens it was chosen for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import NodeProto

from zipc.exporters.fusions import Finder
from zipc.exporters.graph import OnnxGraph, attribute, node
from zipc.exporters.shapes import constant_

MAPS = ("Gemm", "MatMul")  # of floats: an expert in INT8 runs on all tokens
# operators that treat every token by itself
_ROWWISE = frozenset(
    ("Add", "Clip", "Div", "Erf", "Gelu", "Mul", "Relu", "Sigmoid", "Split", "Sub", "Tanh")
)


@dataclass(frozen=True, slots=True)
class _Expert:
    """last(between(firsts(tokens)) * share), as it stands in the graph."""

    tokens: str  # (tokens, in)
    share: str  # (tokens, 1), 0 where the expert was not chosen
    firsts: list[NodeProto]
    between: list[NodeProto]  # in order
    inner: str
    last: NodeProto


def sparse_experts_(graph: OnnxGraph) -> None:
    """Gather the tokens of each expert, send them through its own maps and add them up.

    As traced, all experts see all tokens and most products are multiplied by 0. What is left is
    the work of the chosen ones, and the matrices of an expert that no token chose are not read.
    """
    find = Finder(graph)
    for last in [n for n in graph.nodes if n.op_type in MAPS]:
        expert = _expert(find, last)
        if expert is not None:
            _write_(graph, expert)


def routes(graph: OnnxGraph, lasts: Sequence[NodeProto]) -> set[str]:
    """Values that say which tokens go to the experts that end in `lasts`, from the tokens on."""
    find = Finder(graph)
    found: set[str] = set()
    for last in lasts:
        expert = _expert(find, last)
        if expert is None:
            continue
        stack = [expert.share]
        while stack:
            value = stack.pop()
            made = find.producers.get(value)
            if made is not None and value not in found and value != expert.tokens:
                found.add(value)
                stack += made.input
    return found


def _expert(find: Finder, last: NodeProto) -> _Expert | None:
    """The expert that ends in a map, if there is one."""
    weighted = find.made_by(last.input[0], "Mul") if _is_map(find, last) else None
    if weighted is None:
        return None
    for inner, share in (tuple(weighted.input), tuple(reversed(weighted.input))):
        cut = find.made_by(share, "Slice")
        if cut is None or find.made_by(cut.input[0], "ScatterElements") is None:
            continue
        if find.graph.shapes.get(share, [])[1:] != [1]:
            continue
        region = _between(find, inner)
        if region is not None:
            return _Expert(region[2], share, region[0], region[1], inner, last)
    return None


def _between(find: Finder, inner: str) -> tuple[list[NodeProto], list[NodeProto], str] | None:
    """From the input of the last map up to the first ones: those, the nodes, the tokens."""
    firsts: list[NodeProto] = []
    between: list[NodeProto] = []
    tokens: set[str] = set()

    def climb(value: str) -> bool:
        made = find.producers.get(value)
        if made is None:
            held = find.graph.arrays.get(value)
            return held is not None and held.ndim < 2  # the same for every token
        if any(made is n for n in (*firsts, *between)):
            return True
        if _is_map(find, made):
            firsts.append(made)
            tokens.add(made.input[0])
            return True
        if made.op_type not in _ROWWISE:
            return False
        if made.op_type == "Split" and attribute(made, "axis", 0) not in (-1, 1):
            return False
        sources = made.input[:1] if made.op_type == "Split" else [i for i in made.input if i]
        if not all(climb(s) for s in sources):
            return False
        between.append(made)
        return True

    if not climb(inner) or len(tokens) != 1:
        return None
    (source,) = tokens
    return (firsts, between, source) if len(find.graph.shapes.get(source, [])) == 2 else None


def _is_map(find: Finder, at: NodeProto) -> bool:
    return at.op_type in MAPS and find.graph.linear_width(at) is not None


def _write_(graph: OnnxGraph, expert: _Expert) -> None:
    """Emit an expert on its own tokens; what it makes is added to what is there."""
    made = expert.last.output[0]
    rows, places, share = f"{made}_tokens", f"{made}_places", f"{made}_share"
    graph.nodes += [
        node("Reshape", [expert.share, constant_(graph, [-1])], [f"{made}_shares"]),
        node("NonZero", [f"{made}_shares"], [f"{made}_found"]),
        node("Transpose", [f"{made}_found"], [places], perm=[1, 0]),
        node("GatherND", [expert.tokens, places], [rows]),
        node("GatherND", [expert.share, places], [share]),
    ]
    names = {expert.tokens: rows}
    for old in (*expert.firsts, *expert.between):
        names |= {o: f"{made}/{o}" for o in old.output}
        graph.nodes.append(_copied(old, names))
    last = _copied(expert.last, {expert.last.input[0]: f"{made}_inner", made: f"{made}_part"})
    del last.input[2:]
    graph.nodes += [node("Mul", [names[expert.inner], share], [f"{made}_inner"]), last]
    graph.nodes = [n for n in graph.nodes if n is not expert.last]
    total, result = _sum_(graph, expert)
    if len(expert.last.input) > 2:
        graph.nodes.append(node("Add", [total, expert.last.input[2]], [f"{made}_from"]))
        total = f"{made}_from"
    graph.nodes.append(
        node("ScatterND", [total, places, f"{made}_part"], [result], reduction="add")
    )


def _sum_(graph: OnnxGraph, expert: _Expert) -> tuple[str, str]:
    """What an expert is added to, and what the sum is called; zeros, where there is no such sum."""
    made = expert.last.output[0]
    users = [n for n in graph.nodes if made in n.input]
    if len(users) == 1 and users[0].op_type == "Add" and made not in graph.outputs():
        others = [i for i in users[0].input if i != made]
        if len(others) == 1 and graph.shapes.get(others[0]) == graph.shapes.get(made):
            graph.nodes = [n for n in graph.nodes if n is not users[0]]
            return others[0], str(users[0].output[0])
    width = graph.linear_width(expert.last)
    assert width is not None
    count, shape, zeros = f"{made}_count", f"{made}_shape", f"{made}_none"
    graph.nodes += [
        node("Shape", [expert.tokens], [count], start=0, end=1),
        node("Concat", [count, constant_(graph, [width])], [shape], axis=0),
        node("ConstantOfShape", [shape], [zeros]),
    ]
    return zeros, made


def _copied(old: NodeProto, names: dict[str, str]) -> NodeProto:
    """A node that reads and gives other values."""
    new = NodeProto()
    new.CopyFrom(old)
    for values in (new.input, new.output):
        for i, value in enumerate(values):
            values[i] = names.get(value, value)
    new.name = f"{new.op_type}/{new.output[0]}"
    return new
