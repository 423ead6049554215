"""What an engine holds, read back from it: the inspector's JSON and what its builder said.

The format is that of TensorRT's IEngineInspector, which trtexec writes with --exportLayerInfo,
at the profiling verbosity "detailed"; the lines are those of its verbose log.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto, TensorProto

from zipc.core.errors import EngineFailed
from zipc.exporters.graph import MAPS, OnnxGraph
from zipc.exporters.tensorrt.half import value_types

NUMERICS = ("int8", "fp16", "fp32")  # the fewer bits, the earlier
SPELT = {"int8": "int8", "half": "fp16", "fp16": "fp16", "float": "fp32", "fp32": "fp32"}
TYPE = re.compile(rf"\b({'|'.join(SPELT)})\b", re.IGNORECASE)
NODES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
SPARSE_KERNEL = re.compile(r"spars|sptensor|spmma", re.IGNORECASE)
INT8_KERNEL = re.compile(r"int8|i8i8", re.IGNORECASE)
FOUND = re.compile(r"\(Sparsity\) Found (\d+) layer")
CHOSEN = re.compile(r"\(Sparsity\) Chose (\d+) layer")
MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+)")
NO_ROOM = re.compile(r"out of memory|OutOfMemory|NvMap", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ReadBack:
    """`products`: convolutions and products of matrices by numeric; `unseen` are those that no
    layer of the engine names; `sparse`, by node, those on kernels for 2:4 weights. None where the
    builder did not say."""

    layers: int
    products: Mapping[str, int]
    unseen: int
    sparse: frozenset[str]
    sparse_found: int | None
    sparse_chosen: int | None
    memory_mb: float | None
    short_of_memory: bool

    def __str__(self) -> str:
        counts = [f"{self.products[n]} products in {n}" for n in NUMERICS if n in self.products]
        parts = [f"{self.layers} layers", *counts]
        if self.unseen:
            parts.append(f"{self.unseen} products that no layer names")
        if self.sparse_found is not None:
            parts.append(f"sparse kernels chosen for {self.sparse_chosen or 0} layers")
            parts[-1] += f" of {self.sparse_found} that could have them"
        elif self.sparse:
            parts.append(f"{len(self.sparse)} products on sparse kernels")
        if self.memory_mb is not None:
            parts.append(f"{self.memory_mb:.1f} MB of weights and activations")
        if self.short_of_memory:
            parts.append("memory ran out while it was built, so that kernels were passed over")
        return ", ".join(parts)


def read_back(
    layer_info: str, log: Iterable[str], model: ModelProto, places: Mapping[str, str]
) -> ReadBack:
    """What the engine of `model` computes in, of what its builder said line by line.

    Raises:
        EngineFailed: the engine does not tell, or computes a product in more bits than its graph.
    """
    layers = _layers(layer_info)
    held: dict[str, str] = {}
    for layer in layers:
        if (numeric := _numeric(layer)) is not None:
            for name in _nodes(layer):
                held[name] = min(numeric, held.get(name, "fp32"), key=NUMERICS.index)
    wanted = _wanted(model)
    lost = [n for n, w in wanted.items() if NUMERICS.index(held.get(n, w)) > NUMERICS.index(w)]
    if lost:
        first = lost[0]
        where = f", {places[first]}," if first in places else ""
        raise EngineFailed(
            f"The engine lost precision: {len(lost)} of {len(wanted)} products, first node "
            f"{first!r}{where} in {held[first]} where the graph has {wanted[first]}. Build it with "
            "another TensorRT, or leave that part alone with --exclude."
        )
    lines = list(log)
    found, chosen = (_last(pattern, lines) for pattern in (FOUND, CHOSEN))
    memory = {m[1]: int(m[2]) for line in lines if (m := MEMORY.search(line))}
    return ReadBack(
        layers=len(layers),
        products=Counter(held[name] for name in wanted if name in held),
        unseen=sum(name not in held for name in wanted),
        sparse=frozenset(
            name
            for layer in layers
            if SPARSE_KERNEL.search(layer.get("TacticName", ""))
            for name in _nodes(layer)
            if name in wanted
        ),
        sparse_found=found,
        sparse_chosen=chosen,
        memory_mb=sum(memory.values()) / 1e6 if memory else None,
        short_of_memory=any(NO_ROOM.search(line) for line in lines),
    )


def _layers(layer_info: str) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]]
    try:
        layers = json.loads(layer_info)["Layers"]
    except (ValueError, KeyError, TypeError):
        layers = []
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise EngineFailed(
            "The engine does not tell what its layers compute in, so that lost precision would go "
            "unseen. Build it with TensorRT 10.3 to 11.4."
        )
    return layers


def _nodes(layer: dict[str, Any]) -> list[str]:
    """The ONNX nodes that were fused into a layer."""
    named = NODES.findall(layer.get("Metadata", ""))
    return named or str(layer.get("Name", "")).split(" + ")


def _numeric(layer: dict[str, Any]) -> str | None:
    """The fewest bits among what a layer reads: what is added after a product may be wider.

    None where it does not tell.
    """
    told = [t.get("Format/Datatype", t.get("Datatype", "")) for t in layer.get("Inputs", ())]
    weights = layer.get("Weights")
    if isinstance(weights, dict):
        told.append(weights.get("Type", ""))
    read = {SPELT[m[1].lower()] for text in told if (m := TYPE.search(text))}
    if INT8_KERNEL.search(layer.get("TacticName", "")):
        read.add("int8")
    return min(read, key=NUMERICS.index, default=None)


def _wanted(model: ModelProto) -> dict[str, str]:
    """The numeric of every convolution and product of a graph, by node."""
    graph = OnnxGraph.of(model)
    types, producers = value_types(graph), graph.producers()
    wanted = {}
    for node in graph.nodes:
        if node.op_type not in MAPS:
            continue
        sources = [producers.get(name) for name in node.input[:2]]
        if all(s is not None and s.op_type == "DequantizeLinear" for s in sources):
            wanted[node.name] = "int8"
        else:
            half = types[node.input[0]] == TensorProto.FLOAT16
            wanted[node.name] = "fp16" if half else "fp32"
    return wanted


def _last(pattern: re.Pattern[str], lines: Iterable[str]) -> int | None:
    """Of a count that is told once per pass of the builder, the last one."""
    counts = [int(m[1]) for line in lines if (m := pattern.search(line))]
    return counts[-1] if counts else None
