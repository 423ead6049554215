"""Cut one site with its surroundings out of a graph, so that it can be priced alone."""

from __future__ import annotations

import onnx
from onnx import helper

from zipc.core.errors import UnsupportedModel
from zipc.core.types import Site
from zipc.exporters.graph import OnnxGraph

PASSED = ("Add", "Sum", "BatchNormalization")  # what belongs to a site after its consumer,
LAST = ("LayerNormalization", "RMSNormalization", "Relu", "Clip", "HardSwish")  # up to one of these


def block_ends(graph: OnnxGraph, site: Site) -> tuple[list[str], list[str]]:
    """Values where the surroundings of a site begin and end, in the dense graph.

    They begin at the inputs of the producing maps, and at any other tensor that carries the
    units (a bias per head on the scores, say), and end after the residual sum and the normalisation
    that follow the consumer, where there are such.
    """
    starts: list[str] = []
    for module in site.producers:
        nodes = graph.map_nodes(module + ".weight")
        if not nodes:
            raise UnsupportedModel(f"{module} has no node in the exported graph")
        starts.append(nodes[0].input[0])
    maps = site.maps
    for piece in site.slices:
        if piece.parameter.rpartition(".")[0] not in maps and piece.parameter in graph.weights:
            starts.append(graph.weights[piece.parameter][0])
    consumers = graph.consumers()
    ends: list[str] = []
    for consumer in site.consumers:
        end = graph.map_nodes(consumer.module + ".weight")[0].output[0]
        while True:
            after = consumers.get(end, [])
            chain = [n for n in after if n.op_type in (*PASSED, *LAST)]
            if not chain or end in graph.outputs():
                break
            end = chain[0].output[0]
            if chain[0].op_type in LAST:
                break
        ends.append(end)
    # squeeze-and-excite: what one of its maps gives is what another reads
    starts = [name for name in starts if name not in ends]
    return list(dict.fromkeys(starts)), list(dict.fromkeys(ends))


def extract(graph: OnnxGraph, ends: tuple[list[str], list[str]]) -> OnnxGraph:
    """The nodes between the two ends as a graph of its own.

    Batch and sequence stay symbolic, as in the artifact: with concrete shapes ONNX Runtime fuses
    differently, and the price would be that of another graph.
    Values that come from elsewhere (an attention mask) become inputs too. The result can be
    specialised like the whole graph.
    """
    starts, stops = ends
    producers = graph.producers()
    depends = _dependents(graph, starts)
    inside: dict[int, onnx.NodeProto] = {}
    inputs: list[str] = []
    stack = list(stops)
    seen: set[str] = set()
    while stack:
        name = stack.pop()
        if name in seen or not name or name in graph.arrays:
            continue
        seen.add(name)
        node = producers.get(name)
        if name in starts or node is None or (name not in depends and name not in stops):
            inputs.append(name)
            continue
        inside[id(node)] = node
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
    nodes = [n for n in graph.nodes if id(n) in inside]
    used = {i for n in nodes for i in n.input}
    arrays = {k: v for k, v in graph.arrays.items() if k in used}
    weights = {k: v for k, v in graph.weights.items() if v[0] in used}
    return OnnxGraph(
        proto, nodes, arrays, weights, graph.shapes, graph.types, graph.origin, graph.results
    )


def _dependents(graph: OnnxGraph, starts: list[str]) -> set[str]:
    """Values computed from `starts`."""
    found = set(starts)
    consumers = graph.consumers()
    stack = list(starts)
    while stack:
        for node in consumers.get(stack.pop(), []):
            for output in node.output:
                if output not in found:
                    found.add(output)
                    stack.append(output)
    return found
