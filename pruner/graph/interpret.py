"""Run a traced program with other weights, without building a module.

The search scores hundreds of candidates that differ from each other at one or two sites. A
candidate is a `Variant`: sliced weights, a set of removed maps, and the kept width per site. The
executor runs the dense graph with those weights, skips what a removal made dead, and can start in
the middle from the live values that an earlier run left there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from zipc.core.types import Site
from zipc.numerics import bf16
from zipc.numerics.bf16 import BF16
from zipc.pruner.graph.rules import CREATED
from zipc.pruner.graph.sites import Extent, Structure, extent_size, known_size
from zipc.pruner.graph.trace import MapCall, Program, op_name
from zipc.pruner.products import linear

Env = dict[str, Any]


class MapWeights(Protocol):
    """What replaces the weights of a map: `seen` is its input as the product reads it, and one in
    the numeric bf16 rounds the product before the bias is added."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def numeric(self) -> str: ...
    def seen(self, x: Tensor) -> Tensor: ...


@dataclass(slots=True)
class Variant:
    """One candidate. Empty fields mean the dense model.

    `maps` gives the weights of maps by module path; `constants` maps the module path of a removed
    consumer to its bias; `widths` gives units kept per site; `tensors` overrides others; `picks`
    says where the shares of experts now stand (`mixtures`); `modules` are called in place of maps.
    """

    maps: Mapping[str, MapWeights] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    picks: Mapping[str, int] = field(default_factory=dict)
    modules: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


_RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "expand"})
_SPLITS = frozenset({"split", "chunk", "split_with_sizes"})
_SKIP = ("_assert", "sym_constrain")
_PLANS = 512  # execution plans kept


class Executor:
    """Interpreter of one program; holds no state of any run."""

    def __init__(self, program: Program, structure: Structure) -> None:
        self.program = program
        self.structure = structure
        self.calls: dict[str, MapCall] = {c.node: c for c in program.maps}
        self._index = {n.name: i for i, n in enumerate(program.nodes)}
        self._symbols = _input_symbols(program)
        self._values = dict(program.tensors.values())
        self._parameters = frozenset(program.tensors)
        self._plans: dict[tuple[frozenset[str], ...], tuple[list[fx.Node], dict[str, int]]] = {}

    def run(
        self,
        feeds: Mapping[str, Tensor],
        variant: Variant,
        *,
        start: int = 0,
        live: Env | None = None,
        cuts: Sequence[int] = (),
        stop: int | None = None,
        captured: dict[str, Tensor] | None = None,
        on_map: Callable[[MapCall, Tensor], None] | None = None,
    ) -> tuple[list[Tensor], dict[int, Env]]:
        """Run nodes `start..`; returns the outputs and the live values at each of `cuts`.

        With `stop`, only the nodes before it run and no outputs are returned. The values of the
        nodes that `captured` has keys for are written into it.

        `live` must hold the values a run left at cut `start`; what that run had no need of, because
        all its readers were removed, is computed again. `on_map` sees every map's input,
        before it runs.
        """
        env: Env = dict(live or {})
        order, last_use = self._plan(frozenset(variant.constants), frozenset(env))
        symbols = {s: int(feeds[name].shape[d]) for name, d, s in self._symbols if name in feeds}
        symbols = dict.fromkeys((s for _, _, s in self._symbols), 0) | symbols
        saved: dict[int, Env] = {}
        pending = sorted(c for c in cuts if c >= start)
        for node in order:
            at = self._index[node.name]
            while pending and pending[0] <= at:
                cut = pending.pop(0)
                saved[cut] = {
                    k: v
                    for k, v in env.items()
                    if last_use.get(k, -1) >= cut and k not in self.program.caches
                }
            if stop is not None and at >= stop:
                return [], saved
            env[node.name] = self._step(node, env, feeds, variant, symbols, on_map)
            if captured is not None and node.name in captured:
                captured[node.name] = env[node.name]
            for source in node.all_input_nodes:
                if last_use.get(source.name, -1) <= at:
                    env.pop(source.name, None)
        return [env[o.name] for o in self.program.outputs], saved

    def index(self, node: str) -> int:
        """Place of a node in the order of execution."""
        return self._index[node]

    def needs(self, node: str, variant: Variant) -> bool:
        """Whether the outputs still depend on a node: removals may have cut it off."""
        order, _ = self._plan(frozenset(variant.constants), frozenset())
        return any(n.name == node for n in order)

    def reads_inputs(self, variant: Variant) -> bool:
        """Whether the outputs still depend on the values of any input, not on its sizes alone."""
        stack, seen = list(self.program.outputs), set[str]()
        while stack:
            node = stack.pop()
            if node.name in self.program.inputs:
                return True
            call = self.calls.get(node.name)
            if node.name in seen or (call is not None and call.module in variant.constants):
                continue
            seen.add(node.name)
            stack += [n for n in node.all_input_nodes if not _is_size(n)]
        return False

    def first_effect(self, site: Site, *, also: Collection[str] = ()) -> int:
        """Index of the first node that a change of the tensors of `site` can affect, or `also` of
        others."""
        cut = {piece.parameter for piece in site.slices}.union(also)
        names = {p for p, (name, _) in self.program.tensors.items() if name in cut}
        return min(
            self._index[user.name]
            for node in self.program.nodes
            if node.name in names
            for user in node.users
        )

    def _step(
        self,
        node: fx.Node,
        env: Env,
        feeds: Mapping[str, Tensor],
        variant: Variant,
        symbols: Mapping[str, int],
        on_map: Callable[[MapCall, Tensor], None] | None,
    ) -> Any:
        if node.op == "placeholder":
            if node.name in self.program.caches and node.name not in feeds:
                return self._empty(node, variant, symbols)
            return feeds.get(node.name)

        def value(source: fx.Node) -> Any:
            held = self.program.tensor_of(source)
            return env[source.name] if held is None else variant.tensors.get(held[0], held[1])

        call = self.calls.get(node.name)
        if call is not None:
            constant = variant.constants.get(call.module)
            if constant is not None:
                return self._constant(node, call, constant, variant, symbols)
            x = env[call.source]
            if on_map is not None:
                on_map(call, x)
            if call.module in variant.modules:
                return variant.modules[call.module](x)
            return self._map(node, call, x, variant, value)
        args: list[Any] = list(fx.map_arg(node.args, value))
        kwargs = fx.map_arg(node.kwargs, value)
        if variant.widths:
            name = op_name(node)
            if node.name in variant.picks:
                args[2:4] = [variant.picks[node.name], variant.picks[node.name] + 1]
            if name in _SPLITS and node.name in self.structure.pieces:
                sizes = [extent_size(e, variant.widths) for e in self.structure.pieces[node.name]]
                at = args[2] if len(args) > 2 else kwargs.get("dim", 0)
                return torch.split(args[0], sizes, dim=at)  # type: ignore[arg-type]
            if name == "group_norm":
                args[1] = extent_size(self.structure.groups[node.name], variant.widths)
            if name == "layer_norm":
                args[1] = list(args[0].shape[-len(args[1]) :])
            if name == "unflatten" and node.name in self.structure.shapes:
                sizes = list(args[2])
                first = args[1] % args[0].dim()
                for i, extent in enumerate(self.structure.shapes[node.name][first:][: len(sizes)]):
                    if _has_site(extent) and sizes[i] != -1:
                        sizes[i] = extent_size(extent, variant.widths)
                args[2] = sizes
            elif node.name in self.structure.shapes:
                at = 1 if name in _RESHAPES else CREATED.get(name, -1)
                if at >= 0:
                    args[at] = self._resized(node, list(args[at]), variant.widths)
        if node.target is torch.ops.aten.view.default:  # strides may differ from the trace's
            return args[0].reshape(args[1])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _map(
        self,
        node: fx.Node,
        call: MapCall,
        x: Tensor,
        variant: Variant,
        value: Callable[[fx.Node], Any],
    ) -> Tensor:
        held = variant.maps.get(call.module)
        if held is not None:
            x, weight, bias = held.seen(x), held.weight, held.bias
        else:
            weight = variant.tensors.get(call.weight, self._values[call.weight])
            bias = None
            if call.bias is not None:
                bias = variant.tensors.get(call.bias, self._values[call.bias])
        if not call.convolution:
            matrix = weight if call.out_dim == 0 else weight.T
            if held is not None and held.numeric == BF16:
                product = bf16.rounded(linear(x, matrix, None))
                return product if bias is None else product + bias
            return linear(x, matrix, bias)
        args: list[Any] = list(fx.map_arg(node.args[3:], value))
        if call.groups > 1 and variant.widths:
            args[3] = extent_size(self.structure.groups[node.name], variant.widths)
        result: Tensor = node.target(x, weight, bias, *args)  # type: ignore[operator]
        return result

    def _empty(self, node: fx.Node, variant: Variant, symbols: Mapping[str, int]) -> Tensor:
        """A cache without any token in it."""
        sizes = self._sizes(node, variant, symbols)
        return torch.empty(sizes, dtype=node.meta["val"].dtype)

    def _sizes(self, node: fx.Node, variant: Variant, symbols: Mapping[str, int]) -> list[int]:
        """The shape of a node's result at the widths of a candidate."""
        sizes = [_concrete(s, symbols) for s in _val(node)]
        for i, extent in enumerate(self.structure.shapes.get(node.name, ())):
            sizes[i] = _resized(sizes[i], extent, variant.widths)
        return sizes

    def _constant(
        self,
        node: fx.Node,
        call: MapCall,
        constant: Tensor,
        variant: Variant,
        symbols: Mapping[str, int],
    ) -> Tensor:
        """What a map gives that has lost its whole input: its bias at every position."""
        sizes = self._sizes(node, variant, symbols)
        if not call.convolution:
            return constant.expand(*sizes)
        return constant.view(-1, *[1] * (len(sizes) - 2)).expand(*sizes)

    def _resized(self, node: fx.Node, shape: list[Any], widths: Mapping[str, int]) -> list[Any]:
        for i, extent in enumerate(self.structure.shapes[node.name]):
            if not _has_site(extent):
                continue
            if shape[i] != -1:
                shape[i] = _resized(shape[i], extent, widths)
            elif shape.count(-1) > 1:
                shape[i] = extent_size(extent, widths)
        return shape

    def _plan(
        self, removed: frozenset[str], given: frozenset[str]
    ) -> tuple[list[fx.Node], dict[str, int]]:
        """Nodes still needed beyond the values `given`, and the index of each value's last use."""
        plan = self._plans.get((removed, given))
        if plan is None:
            needed: set[str] = set()
            stack = [o.name for o in self.program.outputs]
            by_name = {n.name: n for n in self.program.nodes}
            last: dict[str, int] = {}
            while stack:
                name = stack.pop()
                if name in needed:
                    continue
                needed.add(name)
                call = self.calls.get(name)
                if name in given or (call is not None and call.module in removed):
                    continue
                for source in by_name[name].all_input_nodes:
                    if source.name in self._parameters:
                        continue
                    last[source.name] = max(last.get(source.name, -1), self._index[name])
                    stack.append(source.name)
            for output in self.program.outputs:
                last[output.name] = len(self.program.nodes)
            order = [
                n
                for n in self.program.nodes
                if n.name in needed and n.name not in given and not str(n.target).startswith(_SKIP)
            ]
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[removed, given] = order, last
        return plan


def _resized(size: int, extent: Extent, widths: Mapping[str, int]) -> int:
    """What a dense size becomes; that of a batch times channels, say, goes down in proportion."""
    kept = extent_size(extent, widths)
    if kept is not None:
        return kept
    return size * known_size(extent, widths) // known_size(extent, {})


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _has_site(extent: Extent) -> bool:
    return any(f.site is not None or any(map(_has_site, f.segments)) for f in extent)


def _val(node: fx.Node) -> Sequence[Any]:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return list(value.shape)


def _concrete(size: Any, symbols: Mapping[str, int]) -> int:
    """The value of a traced size, which may be an expression such as `s1 - 1`."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({s: symbols[str(s)] for s in expression.free_symbols}))


def _input_symbols(program: Program) -> list[tuple[str, int, str]]:
    found = []
    for node in program.nodes:
        if node.op == "placeholder" and node.name in program.inputs:
            for d, size in enumerate(_val(node)):
                if not isinstance(size, int):
                    found.append((node.name, d, str(size)))
    return found


__all__ = ["Env", "Executor", "MapWeights", "Variant"]
