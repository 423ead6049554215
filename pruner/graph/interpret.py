"""Run a traced program with other weights, without building a module.

The search scores hundreds of candidates that differ from each other at one or two sites. A
candidate is a `Variant`: sliced weights, a set of removed maps, and the kept width per site. The
executor runs the dense graph with those weights, skips what a removal made dead, and can start in
the middle from the live values that an earlier run left there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from zipc.core.types import Site
from zipc.pruner.graph.sites import Structure
from zipc.pruner.graph.trace import LinearCall, Program
from zipc.pruner.products import linear

LinearFn = Callable[[Tensor], Tensor]
Env = dict[str, Any]


@dataclass(slots=True)
class Variant:
    """One candidate. Empty fields mean the dense model.

    `linears` maps a linear's module path to its replacement; `constants` maps the module path of a
    removed consumer to its bias; `widths` gives units kept per site; `tensors` overrides others.
    """

    linears: Mapping[str, LinearFn] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


_RESHAPES = {"view", "reshape", "_unsafe_view", "expand"}
_SKIP = ("_assert", "sym_constrain")
_PLANS = 512  # execution plans kept


class Executor:
    """Interpreter of one program; holds no state of any run."""

    def __init__(self, program: Program, structure: Structure) -> None:
        self.program = program
        self.calls: dict[str, LinearCall] = {c.node: c for c in program.linears}
        self._index = {n.name: i for i, n in enumerate(program.nodes)}
        self._symbols = _input_symbols(program)
        self._values = dict(program.tensors.values())
        self._site_dims = {
            name: {i: f for i, f in enumerate(dims) if any(s for s, _ in f)}
            for name, dims in structure.shapes.items()
            if any(s for f in dims for s, _ in f)
        }
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
        on_linear: Callable[[LinearCall, Tensor], None] | None = None,
    ) -> tuple[list[Tensor], dict[int, Env]]:
        """Run nodes `start..`; returns the outputs and the live values at each of `cuts`.

        With `stop`, only the nodes before it run and no outputs are returned. The values of the
        nodes that `captured` has keys for are written into it.

        `live` must hold the values a run left at cut `start`; what that run had no need of, because
        all its readers were removed, is computed again. `on_linear` sees every linear's input,
        before it runs.
        """
        env: Env = dict(live or {})
        order, last_use = self._plan(frozenset(variant.constants), frozenset(env))
        symbols = {s: int(feeds[name].shape[d]) for name, d, s in self._symbols if name in feeds}
        saved: dict[int, Env] = {}
        pending = sorted(c for c in cuts if c >= start)
        for node in order:
            at = self._index[node.name]
            while pending and pending[0] <= at:
                cut = pending.pop(0)
                saved[cut] = {k: v for k, v in env.items() if last_use.get(k, -1) >= cut}
            if stop is not None and at >= stop:
                return [], saved
            env[node.name] = self._step(node, env, feeds, variant, symbols, on_linear)
            if captured is not None and node.name in captured:
                captured[node.name] = env[node.name]
            for source in node.all_input_nodes:
                if last_use.get(source.name, -1) <= at:
                    env.pop(source.name, None)
        return [env[o.name] for o in self.program.outputs], saved

    def position(self, module: str) -> int:
        """Index of the first node that a change at `module` can affect."""
        return min(self._index[c.node] for c in self.program.linears if c.module == module)

    def first_effect(self, site: Site) -> int:
        """Index of the first node that a change of the level of `site` can affect."""
        maps = {*site.producers, *(c.module for c in site.consumers)}
        others = {s.parameter for s in site.slices if s.parameter.rpartition(".")[0] not in maps}
        held = [self._index[p] for p, (name, _) in self.program.tensors.items() if name in others]
        return min([*map(self.position, site.producers), *held])

    def _step(
        self,
        node: fx.Node,
        env: Env,
        feeds: Mapping[str, Tensor],
        variant: Variant,
        symbols: Mapping[str, int],
        on_linear: Callable[[LinearCall, Tensor], None] | None,
    ) -> Any:
        if node.op == "placeholder":
            held = self.program.tensor_of(node)
            if held is not None:
                return variant.tensors.get(held[0], held[1])
            return feeds.get(node.name)
        call = self.calls.get(node.name)
        if call is not None:
            constant = variant.constants.get(call.module)
            if constant is not None:
                sizes = [_concrete(s, symbols) for s in _val(node)[:-1]]
                return constant.expand(*sizes, -1)
            x = env[call.source]
            if on_linear is not None:
                on_linear(call, x)
            replaced = variant.linears.get(call.module)
            if replaced is not None:
                return replaced(x)
            weight = variant.tensors.get(call.weight, self._values[call.weight])
            bias = None
            if call.bias is not None:
                bias = variant.tensors.get(call.bias, self._values[call.bias])
            return linear(x, weight, bias)
        args: Any = fx.map_arg(node.args, lambda n: env[n.name])
        kwargs = fx.map_arg(node.kwargs, lambda n: env[n.name])
        name = str(node.target).removeprefix("aten.").split(".")[0]
        if name in _RESHAPES and node.name in self._site_dims and variant.widths:
            args = (args[0], self._resized(node, list(args[1]), variant.widths), *args[2:])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _resized(self, node: fx.Node, shape: list[Any], widths: Mapping[str, int]) -> list[Any]:
        for i, factors in self._site_dims[node.name].items():
            size = 1
            for site, dense in factors:
                kept = widths.get(site) if site is not None else None
                size *= kept if kept is not None else int(dense or 1)
            if shape[i] != -1 or sum(1 for s in shape if s == -1) > 1:
                shape[i] = size
        return shape

    def _plan(
        self, removed: frozenset[str], given: frozenset[str]
    ) -> tuple[list[fx.Node], dict[str, int]]:
        """Nodes still needed beyond the values `given`, and the index of each value's last use."""
        if (removed, given) not in self._plans:
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
            self._plans[removed, given] = order, last
        return self._plans[removed, given]


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


__all__ = ["Env", "Executor", "LinearFn", "Variant"]
