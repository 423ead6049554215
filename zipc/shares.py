"""What share of the dense model's latency each site takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper

from zipc.core.types import Site, Workload
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.onnx_export import serialised
from zipc.exporters.specialise import Edit, specialise
from zipc.pricing import surroundings
from zipc.profiler.device import GraphTimer
from zipc.profiler.timing import interleave, warm_up

ROUNDS = 10
NOISE = 0.2  # sites that take this much more than the whole model have no share of it


def dense_shares(
    dense: OnnxGraph, sites: Sequence[Site], workload: Workload, timer: GraphTimer
) -> tuple[float, dict[str, float]]:
    """Milliseconds of the dense model, and the share of them that each site takes.

    A share is that of the graph the site is priced in: with the normalisation and the residual sum
    after it. Those of sites that share maps overlap. Every graph pays once for being run at all:
    what a graph of nothing takes is not counted. There are no shares where a site comes out slower
    than the whole all the same, as one whose surroundings count once for every call.
    """
    signatures, parts = surroundings(dense, sites)
    graphs = [specialise(graph, Edit()).to_bytes() for graph in (dense, *parts.values())]
    runners = [timer.load(model, workload=workload) for model in (_nothing(), *graphs)]
    for runner in runners:
        warm_up(runner)
    times = [float(np.median(t)) for t in interleave(runners, rounds=ROUNDS)]
    empty, whole, *rest = times
    alone = {name: max(ms - empty, 0.0) for name, ms in zip(parts, rest, strict=True)}
    spent = {s.name: alone[signatures[s.name]] * s.calls for s in sites}
    inside = whole - empty
    if inside <= 0 or max(spent.values()) > inside * (1 + NOISE):
        return whole, {}
    return whole, {name: min(ms / inside, 1.0) for name, ms in spent.items()}


def _nothing() -> bytes:
    """A graph that gives one number, and takes none: a workload's shapes are for inputs by name."""
    node = helper.make_node("Constant", [], ["y"], value_float=0.0)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    graph = helper.make_graph([node], "nothing", [], [y])
    return serialised(graph)
