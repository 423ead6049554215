"""Cut one site with its surroundings out of a graph, so that it can be priced alone."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from zipc.core.errors import UnsupportedModel
from zipc.core.types import Site
from zipc.exporters.experts import routes
from zipc.exporters.graph import OnnxGraph, transposes
from zipc.exporters.shapes import spread_indices

PASSED = ("Add", "Sum", "BatchNormalization")  # what belongs to a site after its consumer,
LAST = ("LayerNormalization", "RMSNormalization", "Relu", "Clip", "HardSwish")  # up to one of these


def extract(graph: OnnxGraph, site: Site) -> OnnxGraph:
    """The nodes of a site and its surroundings, in the dense graph, as a graph of their own.

    They are the first call of the producing maps, all that carries the units from there on, and the
    first call of the consumers, with the residual sum and the normalisation that follow those,
    where there are such; of a mixture, its experts up to their last maps in place of consumers.
    What lies between the parts of a site that spans layers is left out.

    Batch and sequence stay symbolic, as in the artifact: with concrete shapes ONNX Runtime fuses
    differently, and the price would be that of another graph. Values that come from elsewhere (an
    attention mask) become inputs, where made-up ones do: sizes are computed from the inputs of the
    whole, and what sends tokens to an expert from the tokens. The result can be specialised like
    the whole graph.
    """
    ends = [end for expert in site.experts for end in expert.ends]
    consumed = [_first_call(graph, m) for m in (*(c.module for c in site.consumers), *ends)]
    tails = [_tail(graph, node.output[0]) for node in consumed]
    inside = _carriers(graph, site, end={node.output[0] for node in consumed}).union(*tails)
    inside |= routes(graph, consumed)
    # indices that are spread as far as the values of a site have its sizes
    inside |= {n.output[0] for n in spread_indices(graph)}
    stops = list(dict.fromkeys(tail[-1] for tail in tails))
    producers = graph.producers()
    held: dict[int, onnx.NodeProto] = {}
    inputs: list[str] = []
    stack = list(stops)
    seen: set[str] = set()
    while stack:
        name = stack.pop()
        if name in seen or not name or name in graph.arrays:
            continue
        seen.add(name)
        node = producers.get(name)
        if node is None or not (
            name in inside or _is_sizes(graph, name) or _is_weight(graph, node)
        ):
            inputs.append(name)
            continue
        held[id(node)] = node
        stack += node.input
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    del proto.graph.input[:], proto.graph.output[:]
    for group, names in ((proto.graph.input, inputs), (proto.graph.output, stops)):
        for name in names:
            if name not in graph.shapes:
                raise UnsupportedModel(f"the shape of {name} is unknown in the exported graph")
            kind, shape = graph.types[name], graph.shapes[name]
            group.append(helper.make_tensor_value_info(name, kind, shape))
    nodes = [n for n in graph.nodes if id(n) in held]
    used = {i for n in nodes for i in n.input}
    arrays = {k: v for k, v in graph.arrays.items() if k in used}
    weights = {k: v for k, v in graph.weights.items() if v[0] in used}
    return OnnxGraph(
        proto, nodes, arrays, weights, graph.shapes, graph.types, graph.origin, graph.results
    )


def _first_call(graph: OnnxGraph, module: str) -> onnx.NodeProto:
    nodes = graph.map_nodes(module + ".weight")
    if not nodes:
        raise UnsupportedModel(f"{module} has no node in the exported graph")
    return nodes[0]


def _tail(graph: OnnxGraph, value: str) -> list[str]:
    """What a consumer gives, and what becomes of it up to the end of its block."""
    consumers, outputs = graph.consumers(), graph.outputs()
    found = [value]
    while found[-1] not in outputs:
        after = consumers.get(found[-1], [])
        following = next((n for n in after if n.op_type in (*PASSED, *LAST)), None)
        if following is None:
            break
        found.append(following.output[0])
        if following.op_type in LAST:
            break
    return found


def _carriers(graph: OnnxGraph, site: Site, *, end: set[str]) -> set[str]:
    """Values that carry the units of a site, from the producing maps to what the consumers give.

    Other tensors may carry them too: a bias per head on the scores, say.
    """
    maps = site.maps
    inside = tuple(f"{module}." for expert in site.experts for module in expert.modules)
    experts = [
        n for name in graph.weights if name.startswith(inside) for n in graph.map_nodes(name)
    ]
    begin = [
        o for n in (*(_first_call(graph, m) for m in site.producers), *experts) for o in n.output
    ]
    for piece in site.slices:
        name = piece.parameter
        if name.rpartition(".")[0] not in maps and name in graph.weights:
            begin.append(graph.weights[name][0])
    found = set(begin) | end
    consumers = graph.consumers()
    stack = [value for value in begin if value not in end]
    while stack:
        for node in consumers.get(stack.pop(), []):
            fresh = [output for output in node.output if output not in found]
            found.update(fresh)
            stack += fresh
    return found


def _is_weight(graph: OnnxGraph, node: onnx.NodeProto) -> bool:
    """Whether a node transposes a weight, since an embedding reads it as it is."""
    return transposes(node) and node.input[0] in graph.arrays


def _is_sizes(graph: OnnxGraph, value: str) -> bool:
    """Whether a value is a size or a shape: a whole number or a vector of them."""
    return graph.types.get(value) == TensorProto.INT64 and len(graph.shapes.get(value, [0, 0])) < 2
