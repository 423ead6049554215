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
from zipc.pruner.evidence import data_rows
from zipc.pruner.graph.interpret import Env, Executor, Variant
from zipc.pruner.graph.trace import MapCall, Program, op_name
from zipc.pruner.levels import Levels, MapState, States, variant_of
from zipc.pruner.maps import bias_of_rows, input_rows, matrices, output_rows, own_layout
from zipc.pruner.products import linear, second_moment

Feeds = Mapping[str, Tensor]
RIDGE = 1e-1  # of the mean diagonal; draws the update towards no change
SAMPLE_ROWS = 64  # rows kept per batch for activation ranges
PATCHES = 1024  # of a convolution's input, drawn from each batch

_PASSES = ("dropout", "clone", "contiguous", "alias", "detach", "getitem")
_BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit_no_training")


@dataclass(frozen=True, slots=True)
class _Sum:
    """Where the output of a consumer is added to the residual: (sum node, other operand).

    On the way there it may be scaled and shifted by channel, as a BatchNorm does.
    """

    total: str
    residual: str | None
    stop: int
    scale: Tensor | None = None  # (out,)
    shift: Tensor | None = None

    def before(self, rows: Tensor) -> Tensor:
        """Undo scale and shift on (rows, out); a channel that is scaled to nothing gives zero."""
        if self.scale is None or self.shift is None:
            return rows
        dead = self.scale.abs() < 1e-6
        return ((rows - self.shift) / self.scale.masked_fill(dead, 1.0)).masked_fill(dead, 0.0)


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
) -> States:
    """Weights of every map under `allocation`, repaired in order of execution.

    Sites whose modules run several times, or that have several or grouped consumers, keep the
    weights of their ladder.
    """
    sites = sorted(
        (levels.sites[n] for n in allocation.levels), key=lambda s: executor.first_effect(s)
    )
    run = _Run(executor, levels, allocation, batches)
    done: set[str] = set()
    for site in sites:
        level = allocation.levels[site.name]
        where = _residual_sum(executor.program, site, levels)
        consumer = site.consumers[0].module
        if where is None:
            run.feed_back([*site.producers, *(c.module for c in site.consumers)])
        elif consumer not in done and not levels.idle(consumer, allocation):
            run.reach(executor.first_effect(site))
            _repair(run, site, level, where, ridge)
            done.add(consumer)
        if on_site is not None:
            on_site(site.name)
    return run.states


class _Run:
    """The dense and the compressed model, side by side, both at the same node of the graph."""

    def __init__(
        self,
        executor: Executor,
        levels: Levels,
        allocation: Allocation,
        batches: Sequence[Feeds],
    ) -> None:
        self.executor = executor
        self.levels = levels
        self.allocation = allocation
        self.states = levels.states(allocation)
        self.batches = batches
        self.at = 0
        self.dense: list[Env] = [{} for _ in batches]
        self.small: list[Env] = [{} for _ in batches]

    def variant(self) -> Variant:
        return variant_of(self.allocation, self.states)

    def feed_back(self, modules: Sequence[str]) -> None:
        """Round these maps once more, with error feedback."""
        fed = self.levels.states(self.allocation, feedback=True)
        self.states.maps |= {m: fed.maps[m] for m in modules if m in fed.maps}

    def call(self, module: str) -> MapCall:
        return self.levels.calls[module]

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
        on_map: Callable[[MapCall, Tensor], None] | None = None,
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
            on_map=on_map,
        )
        return {**found, **wanted}

    def pick(self, i: int, call: MapCall, x: Tensor) -> Tensor:
        """The rows of batch `i` that count: tokens without padding, some patches."""
        held = self.batches[i].get("attention_mask")
        mask = None if held is None else held.bool()
        generator = torch.Generator().manual_seed(i)
        limit = PATCHES if call.convolution else None
        return data_rows(call, x, mask, limit=limit, generator=generator)


def _repair(run: _Run, site: Site, level: Level, where: _Sum, ridge: float) -> None:
    consumer = site.consumers[0].module
    call = run.call(consumer)
    if consumer in run.states.constants:
        run.states.constants[consumer] = _mean_error(run, call, where)
        return
    if level.numeric != "fp32":
        _round_producers(run, site, where)
    rounder = run.states.maps[consumer]
    base = _unrounded(run, consumer)
    matrix = matrices(call, base.weight)[0]
    outputs = run.levels.outputs(consumer, run.allocation)
    moments = _Moments()
    for i in range(len(run.batches)):
        inputs: list[Tensor] = []

        def see(at: MapCall, x: Tensor, inputs: list[Tensor] = inputs) -> None:
            if at.module == consumer:
                inputs.append(x)

        target, residual = _sums(run, i, where, on_map=see)
        x = rounder.seen(inputs[0])
        pick = run.pick(i, call, x)
        rows = input_rows(call, x, pick)
        value = output_rows(call, target if residual is None else target - residual, pick)
        moments.add(rows, where.before(value)[:, outputs] - linear(rows, matrix, base.bias))
    change, shift = moments.correction(ridge)
    weight = own_layout(call, (matrix.double() + change).float()[None], base.weight)
    shift = bias_of_rows(call, shift[None], base.weight)
    bias = shift if base.bias is None else base.bias.double() + shift
    run.states.maps[consumer] = _rounded(run, call, weight, bias, rounder.numeric, moments)


def _unrounded(run: _Run, module: str) -> MapState:
    """The weights of a map at its widths, in fp32."""
    plain = {n: Level(lv.width) for n, lv in run.allocation.levels.items()}
    names = run.levels.touching(module)
    made = run.levels.map_state(module, tuple((n, plain[n]) for n in names if n in plain))
    assert isinstance(made, MapState)
    return made


def _round_producers(run: _Run, site: Site, where: _Sum) -> None:
    """Round the producers with error feedback from the inputs they will really see."""
    held = {m: run.states.maps[m] for m in site.producers if m in run.states.maps}
    moments = {m: _Moments() for m in held}
    for i in range(len(run.batches)):

        def see(at: MapCall, x: Tensor, i: int = i) -> None:
            if at.module in moments:
                x = held[at.module].seen(x)
                moments[at.module].add(input_rows(at, x, run.pick(i, at, x)), None)

        run.values(i, (), dense=False, stop=where.stop, on_map=see)
    for module, found in moments.items():
        plain = _unrounded(run, module)
        run.states.maps[module] = _rounded(
            run, run.call(module), plain.weight, plain.bias, held[module].numeric, found
        )


def _rounded(
    run: _Run, call: MapCall, weight: Tensor, bias: Tensor | None, numeric: str, moments: _Moments
) -> MapState:
    """Round a weight, and let the bias make up for the mean of what rounding changes."""
    state = run.levels.rounded(
        call,
        weight,
        None if bias is None else bias.float(),
        numeric,
        gram=moments.gram,
        sample=torch.cat(moments.samples),
    )
    if state.integer is None or bias is None:
        return state
    mean = moments.total / moments.count
    lost = matrices(call, weight)[0].double() - matrices(call, state.weight)[0].double()
    return replace(state, bias=(bias.double() + lost @ mean).float())


def _mean_error(run: _Run, call: MapCall, where: _Sum) -> Tensor:
    total, count = torch.zeros(()), 0
    outputs = run.levels.outputs(call.module, run.allocation)
    for i in range(len(run.batches)):
        target, residual = _sums(run, i, where)
        value = target if residual is None else target - residual
        if call.convolution:
            rows = value.movedim(1, -1).flatten(0, -2)
        else:
            rows = value.flatten(0, -2)[run.pick(i, call, value)]
        rows = where.before(rows)[:, outputs]
        total, count = total + rows.sum(0, dtype=torch.float64), count + len(rows)
    return (total / count).float()


def _sums(
    run: _Run,
    i: int,
    where: _Sum,
    on_map: Callable[[MapCall, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The dense sum of batch `i`, and the compressed model's residual that goes into it."""
    target = run.values(i, [where.total], dense=True, stop=where.stop)[where.total]
    names = [] if where.residual is None else [where.residual]
    found = run.values(i, names, dense=False, stop=where.stop, on_map=on_map)
    return target, found[where.residual] if where.residual is not None else None


def _residual_sum(program: Program, site: Site, levels: Levels) -> _Sum | None:
    """Where the site's output joins the residual; its own output where nothing is added to it."""
    if site.calls != 1 or len(site.consumers) != 1:
        return None
    call = levels.calls[site.consumers[0].module]
    if call.groups > 1 or call.transposed:
        return None
    index = {n.name: i for i, n in enumerate(program.nodes)}
    own = node = program.nodes[index[call.node]]
    scale = shift = None
    while len(node.users) == 1 and not levels.gives_units(call.module):
        user = next(iter(node.users))
        op = op_name(user)
        if op in _PASSES:
            node = user
            continue
        if op in _BATCH_NORMS and scale is None:
            scale, shift = _affine(program, user)
            node = user
            continue
        if op == "add" and not user.kwargs:
            others = [a for a in user.args if a is not node]
            if len(others) == 1 and isinstance(others[0], fx.Node) and _alike(others[0], user):
                return _Sum(user.name, others[0].name, index[user.name] + 1, scale, shift)
        break
    return _Sum(own.name, None, index[own.name] + 1)


def _affine(program: Program, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel in an evaluation-mode BatchNorm."""
    held = [program.tensor_of(a) for a in norm.args[1:5]]
    weight, bias, mean, var = (None if h is None else h[1] for h in held)
    assert mean is not None
    assert var is not None
    eps = norm.args[7] if op_name(norm) == "batch_norm" else norm.args[6]
    scale = torch.rsqrt(var + float(eps))  # type: ignore[arg-type]
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _alike(node: fx.Node, other: fx.Node) -> bool:
    a, b = node.meta.get("val"), other.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
