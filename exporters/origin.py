"""Which traced operation each value of an exported graph comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from onnx import NodeProto
from torch import fx

from zipc.core.nodes import module_of
from zipc.exporters.graph import OnnxGraph

_FX_NODE = "pkg.torch.onnx.fx_node"  # where the exporter keeps the text of a node


# operations that hand their input on; the optimiser drops them
_NOTHING = ("contiguous", "clone", "dropout", "alias", "detach", "to", "feature_dropout")


@dataclass(frozen=True, slots=True)
class Origin:
    """`back`: node of the decomposed program -> node of the traced program it was made from.

    The exporter takes operations apart and numbers their nodes anew, so that equal names in the two
    programs need not mean the same node. Nodes of the decomposed program come in its order.
    """

    back: dict[str, str]
    traced: fx.Graph

    def of(self, nodes: Iterable[NodeProto]) -> dict[str, str]:
        """ONNX value -> traced node, for all values that the exporter made from one."""
        found: dict[str, str] = {}
        for node in nodes:
            texts = [p.value for p in node.metadata_props if p.key == _FX_NODE]
            named = re.match(r"%(\w+) ", texts[0]) if texts else None
            for output in node.output:
                name = output if output in self.back else named.group(1) if named else ""
                if name in self.back:
                    found[output] = self.back[name]
        return found

    def results(self, nodes: Iterable[NodeProto]) -> dict[str, str]:
        """Traced node -> the ONNX value that holds its result, where one value does."""
        values = {o for n in nodes for o in n.output}
        found = {name: value for value, name in self.back.items() if value in values}
        for node in self.traced.nodes:
            if node.op == "call_function" and node.name not in found and _does_nothing(node):
                before = node.all_input_nodes[0].name
                if before in found:
                    found[node.name] = found[before]
        return found


def origin_of(
    decomposed: torch.export.ExportedProgram, traced: torch.export.ExportedProgram
) -> Origin:
    """Follow the provenance that torch keeps through its own decomposition."""
    wanted = id(traced.graph)
    items = _items(traced.graph)
    back: dict[str, str] = {}
    for node in decomposed.graph.nodes:
        sources = list(node.meta.get("from_node") or [])
        while sources and sources[0].graph_id != wanted:
            sources = list(sources[0].from_node or [])
        if not sources:
            continue
        name = sources[0].name
        if node.op == "call_function" and _is_item(node):
            name = items.get((name, node.args[1]), name)
        back[node.name] = name
    return Origin(back, traced.graph)


def places(graph: OnnxGraph, traced: torch.export.ExportedProgram) -> dict[str, str]:
    """Name of an ONNX node -> the traced operation and the torch module it came from.

    A node that a pass made has the place of the nearest one that has a place: a Cast that of what
    reads it.
    """
    paths = {n.name: module_of(n)[0] for n in traced.graph.nodes}
    producers, consumers = graph.producers(), graph.consumers()
    found: dict[str, str] = {}
    for node in graph.nodes:
        at, seen = [node], {id(node)}
        for near in at:
            name = next((graph.origin[o] for o in near.output if o in graph.origin), None)
            if name is not None:
                found[node.name] = f"{name} of {paths.get(name) or 'the model itself'}"
                break
            around = [c for o in near.output for c in consumers.get(o, [])]
            around += [producers[i] for i in near.input if i in producers]
            at += [n for n in around if id(n) not in seen]
            seen.update(id(n) for n in around)
    return found


def _items(graph: fx.Graph) -> dict[tuple[str, object], str]:
    """(node with several results, index) -> the node that picks that result."""
    return {(n.args[0].name, n.args[1]): n.name for n in graph.nodes if _is_item(n)}


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _does_nothing(node: fx.Node) -> bool:
    name = str(node.target).removeprefix("aten.").split(".")[0]
    if name not in _NOTHING or not node.all_input_nodes:
        return False
    new, old = node.meta.get("val"), node.all_input_nodes[0].meta.get("val")
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
        return False
    return new.dtype == old.dtype and new.shape == old.shape
