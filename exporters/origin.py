"""Which traced operation each value of an exported graph comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from onnx import NodeProto
from torch import fx

_FX_NODE = "pkg.torch.onnx.fx_node"  # where the exporter keeps the text of a node


@dataclass(frozen=True, slots=True)
class Origin:
    """`back`: node of the decomposed program -> node of the traced program it was made from.

    The exporter takes operations apart and numbers their nodes anew, so that equal names in the two
    programs need not mean the same node. `order` is the position in the decomposed program.
    """

    back: dict[str, str]
    order: dict[str, int]

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
        """Traced node -> the ONNX value that holds its result.

        A node without one was merged into another or did nothing.
        """
        values = [o for n in nodes for o in n.output if o in self.back]
        return {self.back[v]: v for v in sorted(values, key=self.order.__getitem__)}


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
    order = {n.name: i for i, n in enumerate(decomposed.graph.nodes)}
    return Origin(back, order)


def _items(graph: fx.Graph) -> dict[tuple[str, object], str]:
    """(node with several results, index) -> the node that picks that result."""
    return {(n.args[0].name, n.args[1]): n.name for n in graph.nodes if _is_item(n)}


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"
