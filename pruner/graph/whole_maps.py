"""Linear maps that no site has a part of, as sites of one unit: only their numeric is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from zipc.core.nodes import module_of
from zipc.core.types import Consumer, Site, Slice
from zipc.pruner.graph.rules.maps import not_its_own, other_readers
from zipc.pruner.graph.sites import Structure, live_nodes, wanted
from zipc.pruner.graph.trace import MapCall, Program, op_name

LEAST_WEIGHTS = 1 << 14  # of a map: with fewer, rounding its input takes what integers save


def with_whole_maps(
    program: Program,
    structure: Structure,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Structure:
    """The structure with every linear map that no site cuts: the last one of a language model, say,
    or those of attention whose heads are left alone.

    `include`/`exclude` are globs over their module paths.
    """
    taken = {m for site in structure.sites for m in site.maps}
    taken |= {site.name for site in structure.sites}
    cut = {piece.parameter for site in structure.sites for piece in site.slices}
    weights, live = dict(program.tensors.values()), live_nodes(program)
    nodes = {node.name: node for node in program.nodes}
    calls: dict[str, list[MapCall]] = {}
    for call in program.maps:
        calls.setdefault(call.weight, []).append(call)
    found = []
    for weight, runs in calls.items():
        module = runs[0].module
        large = weights[weight].numel() >= LEAST_WEIGHTS
        free = module not in taken and weight not in cut and wanted(module, include, exclude)
        read = any(call.node in live for call in runs)
        if large and free and read and all(_plain(program, nodes[c.node], c) for c in runs):
            found.append(_site(runs[0], weights[weight].shape, len(runs)))
    return replace(structure, sites=[*structure.sites, *found])


def _plain(program: Program, node: fx.Node, call: MapCall) -> bool:
    """Whether a linear map can take the place of the module that has the weight.

    An embedding that has the same weight keeps its own.
    """
    if call.convolution or not call.rounds or not_its_own(program, node, call) is not None:
        return False
    return call.weight in program.exported.graph_signature.parameters and all(
        op_name(reader) == "embedding" and f"{module_of(reader)[0]}.weight" in program.fixed
        for reader in other_readers(node, call)
    )


def _site(call: MapCall, shape: Sequence[int], runs: int) -> Site:
    every = (tuple(range(shape[call.in_dim])),)
    return Site(
        name=call.module,
        kind="map",
        units=1,
        slices=(Slice(call.weight, call.in_dim, every),),
        consumers=(Consumer(call.module, every),),
        producers=(),
        signature=f"map-{tuple(shape)}-{call.out_dim}-x{runs}",
        calls=runs,
        removable=False,
    )
