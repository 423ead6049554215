"""Repair the sites of a chosen allocation one after another, on what really reaches them.

The ladder's weights are fitted to the dense model's activations. In the compiled model the inputs
of a site already carry the errors of everything before it. Going through the sites in order, each
consumer is fitted once more, by ridge regression from the inputs it will really see (pruned,
rounded) to the value that makes the residual sum what it is in the dense model. Closed form, no
labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from zipc.core.types import Allocation, Level, Site
from zipc.pruner.graph.interpret import Env, Executor, Variant
from zipc.pruner.graph.trace import LinearCall, Program
from zipc.pruner.levels import Levels, LinearState, SiteState, variant_of
from zipc.pruner.products import linear, second_moment

Feeds = Mapping[str, Tensor]
RIDGE = 1e-1  # of the mean diagonal; draws the update towards no change
SAMPLE_ROWS = 64  # rows kept per batch for activation ranges

_PASSES = ("dropout", "clone", "contiguous", "alias", "detach")


@dataclass(frozen=True, slots=True)
class _Sum:
    """Where the output of a consumer is added to the residual: (sum node, other operand)."""

    total: str
    residual: str | None
    stop: int


class _Moments:
    """Second moments of inputs and of the error still to be explained."""

    def __init__(self) -> None:
        self.count = 0
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None
        self.total = torch.zeros(())
        self.missing = torch.zeros(())
        self.samples: list[Tensor] = []

    def add(self, x: Tensor, error: Tensor | None) -> None:
        """x (n, in); error (n, out)."""
        gram = second_moment(x).double()
        self.gram = gram if self.gram is None else self.gram + gram
        self.total = self.total + x.sum(0, dtype=torch.float64)
        self.count += len(x)
        self.samples.append(x[:SAMPLE_ROWS].clone())
        if error is not None:
            cross = linear(error.T.contiguous(), x.T.contiguous()).double()
            self.cross = cross if self.cross is None else self.cross + cross
            self.missing = self.missing + error.sum(0, dtype=torch.float64)

    def correction(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Change of weight (out, in) and bias (out,) that best explains the error, in fp64."""
        assert self.gram is not None
        assert self.cross is not None
        mean, missing = self.total / self.count, self.missing / self.count
        gram = self.gram - self.count * torch.outer(mean, mean)
        cross = self.cross - self.count * torch.outer(missing, mean)
        scale = float(gram.diagonal().mean())
        gram.diagonal().add_(ridge * scale if scale > 0 else 1.0)
        change = torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T
        return change, missing - change @ mean


def propagate(
    executor: Executor,
    levels: Levels,
    allocation: Allocation,
    batches: Sequence[Feeds],
    *,
    ridge: float = RIDGE,
    on_site: Callable[[str], None] | None = None,
) -> dict[str, SiteState]:
    """Weights of every site of `allocation`, repaired in order of execution.

    Sites whose modules run several times, or that have several consumers, keep the weights of
    their ladder.
    """
    states = levels.states(allocation)
    sites = sorted(
        (levels.sites[n] for n in allocation.levels), key=lambda s: executor.first_effect(s)
    )
    run = _Run(executor, allocation, states, batches)
    for site in sites:
        level = allocation.levels[site.name]
        where = _residual_sum(executor.program, site)
        if where is None:
            states[site.name] = levels.state(site.name, level, feedback=True)
        else:
            run.reach(executor.first_effect(site))
            _repair(run, levels, site, level, where, ridge)
        if on_site is not None:
            on_site(site.name)
    return states


class _Run:
    """The dense and the compressed model, side by side, both at the same node of the graph."""

    def __init__(
        self,
        executor: Executor,
        allocation: Allocation,
        states: dict[str, SiteState],
        batches: Sequence[Feeds],
    ) -> None:
        self.executor = executor
        self.allocation = allocation
        self.states = states
        self.batches = batches
        self.at = 0
        self.dense: list[Env] = [{} for _ in batches]
        self.small: list[Env] = [{} for _ in batches]

    def variant(self) -> Variant:
        return variant_of(self.allocation, self.states)

    @torch.no_grad()
    def reach(self, cut: int) -> None:
        """Run both models up to node `cut` with the weights as they are now."""
        if cut <= self.at:
            return
        small = self.variant()
        for i, feeds in enumerate(self.batches):
            for lives, variant in ((self.dense, Variant()), (self.small, small)):
                _, saved = self.executor.run(
                    feeds, variant, start=self.at, live=lives[i], cuts=[cut], stop=cut
                )
                lives[i] = saved[cut]
        self.at = cut

    @torch.no_grad()
    def values(
        self,
        i: int,
        names: Sequence[str],
        *,
        dense: bool,
        stop: int,
        on_linear: Callable[[LinearCall, Tensor], None] | None = None,
    ) -> dict[str, Tensor]:
        """Values of nodes between here and `stop`, or already live, for batch `i`."""
        live = (self.dense if dense else self.small)[i]
        found = {n: live[n] for n in names if n in live}
        wanted = {n: torch.empty(0) for n in names if n not in live}
        self.executor.run(
            self.batches[i],
            Variant() if dense else self.variant(),
            start=self.at,
            live=live,
            stop=stop,
            captured=wanted,
            on_linear=on_linear,
        )
        return {**found, **wanted}

    def rows(self, i: int, x: Tensor) -> Tensor:
        """Tokens of a value (batch, length, width), padding left out; rows of any other."""
        mask = self.batches[i]["attention_mask"].bool()
        tokens = x.dim() == 3 and x.shape[:2] == mask.shape
        return x[mask] if tokens else x.flatten(0, -2)


def _repair(run: _Run, levels: Levels, site: Site, level: Level, where: _Sum, ridge: float) -> None:
    consumer = site.consumers[0].module
    if level.removed:
        run.states[site.name] = SiteState(constants={consumer: _mean_error(run, where)})
        return
    if level.numeric != "fp32":
        _round_producers(run, levels, site, level, where)
    base = levels.state(site.name, Level(level.width)).linears[consumer]
    moments = _Moments()
    rounder = run.states[site.name].linears[consumer]
    for i in range(len(run.batches)):
        inputs: list[Tensor] = []

        def see(call: LinearCall, x: Tensor, inputs: list[Tensor] = inputs) -> None:
            if call.module == consumer:
                inputs.append(x)

        target, residual = _sums(run, i, where, on_linear=see)
        x = run.rows(i, rounder.seen(inputs[0]))
        error = run.rows(i, target if residual is None else target - residual)
        moments.add(x, error - linear(x, base.weight, base.bias))
    change, shift = moments.correction(ridge)
    weight = (base.weight.double() + change).float()
    bias = shift if base.bias is None else base.bias.double() + shift
    fitted = _rounded(levels, weight, bias, level.numeric, moments)
    held = run.states[site.name]
    run.states[site.name] = replace(held, linears={**held.linears, consumer: fitted})


def _round_producers(run: _Run, levels: Levels, site: Site, level: Level, where: _Sum) -> None:
    """Round the producers with error feedback from the inputs they will really see."""
    plain = levels.state(site.name, Level(level.width)).linears
    held = run.states[site.name].linears
    moments = {m: _Moments() for m in site.producers}
    for i in range(len(run.batches)):

        def see(call: LinearCall, x: Tensor, i: int = i) -> None:
            if call.module in moments:
                moments[call.module].add(run.rows(i, held[call.module].seen(x)), None)

        run.values(i, (), dense=False, stop=where.stop, on_linear=see)
    rounded = {
        m: _rounded(levels, plain[m].weight, plain[m].bias, level.numeric, moments[m])
        for m in site.producers
    }
    state = run.states[site.name]
    run.states[site.name] = replace(state, linears={**state.linears, **rounded})


def _rounded(
    levels: Levels, weight: Tensor, bias: Tensor | None, numeric: str, moments: _Moments
) -> LinearState:
    """Round a weight, and let the bias make up for the mean of what rounding changes."""
    state = levels.rounded(
        weight,
        None if bias is None else bias.float(),
        numeric,
        gram=moments.gram,
        sample=torch.cat(moments.samples),
    )
    if state.integer is None or bias is None:
        return state
    mean = moments.total / moments.count
    drift = (weight.double() - state.weight.double()) @ mean
    return replace(state, bias=(bias.double() + drift).float())


def _mean_error(run: _Run, where: _Sum) -> Tensor:
    total, count = torch.zeros(()), 0
    for i in range(len(run.batches)):
        target, residual = _sums(run, i, where)
        rows = run.rows(i, target if residual is None else target - residual)
        total, count = total + rows.sum(0, dtype=torch.float64), count + len(rows)
    return (total / count).float()


def _sums(
    run: _Run,
    i: int,
    where: _Sum,
    on_linear: Callable[[LinearCall, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The dense sum of batch `i`, and the compressed model's residual that goes into it."""
    target = run.values(i, [where.total], dense=True, stop=where.stop)[where.total]
    names = [] if where.residual is None else [where.residual]
    found = run.values(i, names, dense=False, stop=where.stop, on_linear=on_linear)
    return target, found[where.residual] if where.residual is not None else None


def _residual_sum(program: Program, site: Site) -> _Sum | None:
    """Where the site's output joins the residual; its own output where nothing is added to it."""
    if site.calls != 1 or len(site.consumers) != 1:
        return None
    call = next(c for c in program.linears if c.module == site.consumers[0].module)
    index = {n.name: i for i, n in enumerate(program.nodes)}
    own = node = program.nodes[index[call.node]]
    while len(node.users) == 1:
        user = next(iter(node.users))
        op = str(user.target).removeprefix("aten.").split(".")[0]
        if op in _PASSES:
            node = user
            continue
        if op == "add" and not user.kwargs:
            others = [a for a in user.args if a is not node]
            if len(others) == 1 and isinstance(others[0], fx.Node) and _alike(others[0], user):
                return _Sum(user.name, others[0].name, index[user.name] + 1)
        break
    return _Sum(own.name, None, index[own.name] + 1)


def _alike(node: fx.Node, other: fx.Node) -> bool:
    a, b = node.meta.get("val"), other.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
