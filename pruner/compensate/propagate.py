"""Repair the sites of a chosen allocation one after another, on what really reaches them.

The ladder's weights are fitted to the dense model's activations. In the compiled model the inputs
of a site already carry the errors of everything before it. Going through the sites in order, each
consumer is fitted once more, by ridge regression from the inputs it will really see (pruned,
rounded) to the value that makes the residual sum what it is in the dense model. Closed form, no
labels, no gradients. Sparsity patterns and rounding come after it, from the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, fx

from zipc.core.types import Allocation, Level, Site
from zipc.numerics.int8 import STATIC, ActivationRange, calibrate
from zipc.pruner.compensate.least_squares import center, damped_cholesky
from zipc.pruner.evidence import data_rows
from zipc.pruner.graph.interpret import Env, Executor, Variant
from zipc.pruner.graph.trace import MapCall, Program, op_name
from zipc.pruner.levels import Levels
from zipc.pruner.maps import bias_of_rows, input_rows, matrices, output_rows, own_layout
from zipc.pruner.products import cross_moment, linear, second_moment
from zipc.pruner.sparse import to_pattern
from zipc.pruner.states import MapState, States, divided, variant_of
from zipc.pruner.workers import side_by_side

T = TypeVar("T")
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
    at: int  # index of the sum
    scale: Tensor | None = None  # (out,)
    shift: Tensor | None = None

    def before(self, rows: Tensor) -> Tensor:
        """Undo scale and shift on (rows, out); a channel that is scaled to nothing gives zero."""
        if self.scale is None or self.shift is None:
            return rows
        dead = self.scale.abs() < 1e-6
        return ((rows - self.shift) / self.scale.masked_fill(dead, 1.0)).masked_fill(dead, 0.0)

    def among(self, outputs: Tensor) -> _Sum:
        """The same of some channels."""
        if self.scale is None or self.shift is None:
            return self
        return replace(self, scale=self.scale[outputs], shift=self.shift[outputs])


@dataclass(slots=True)
class _Moments:
    """Second moments of inputs and of the error still to be explained, in fp64."""

    count: int
    gram: Tensor  # (in, in)
    cross: Tensor | None  # (out, in)
    total: Tensor
    missing: Tensor
    samples: list[Tensor]

    @classmethod
    def of(cls, x: Tensor, error: Tensor | None) -> _Moments:
        """x (n, in); error (n, out)."""
        cross, missing = None, torch.zeros(())
        if error is not None:
            cross = cross_moment(error, x)
            missing = error.sum(0, dtype=torch.float64)
        total = x.sum(0, dtype=torch.float64)
        return cls(len(x), second_moment(x), cross, total, missing, [x[:SAMPLE_ROWS].clone()])

    def add(self, other: _Moments) -> None:
        self.count += other.count
        self.gram += other.gram
        if self.cross is not None and other.cross is not None:
            self.cross += other.cross
        self.total = self.total + other.total
        self.missing = self.missing + other.missing
        self.samples += other.samples

    def correction(self, ridge: float, *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Change of weight (out, in) and bias (out,) that best explains the error, in fp64; for
        `noise` see `center`."""
        assert self.cross is not None
        missing = self.missing / self.count
        gram, mean = center(self.gram, self.total, self.count, noise=noise)
        cross = self.cross - self.count * torch.outer(missing, mean)
        cross[:, gram.diagonal() == 0] = 0.0
        lower, _ = damped_cholesky(gram, ridge, scale=float(gram.diagonal().mean()))
        change = torch.cholesky_solve(cross.T, lower).T
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
        (levels.sites[n] for n in allocation.levels),
        key=lambda s: levels.first_effect(executor, s.name),
    )
    sums = [_residual_sum(executor, site, levels) for site in sites]
    run = _Run(executor, levels, allocation, batches)
    done = set(run.states.silent)
    for i, (site, where) in enumerate(zip(sites, sums, strict=True)):
        level = allocation.levels[site.name]
        consumer = site.consumers[0].module if site.consumers else None
        if where is None or consumer is None:
            run.feed_back([m for m in site.maps if m not in done])
        elif consumer not in done and executor.needs(where.total, run.variant()):
            run.small.reach(levels.first_effect(executor, site.name), run.variant())
            run.dense.reach(min(s.at for s in sums[i:] if s is not None), Variant())
            _repair(run, site, level, where, ridge, done)
            done.add(consumer)
        if on_site is not None:
            on_site(site.name)
    return run.states


class _Walk:
    """One model, stopped at the same node in every batch."""

    def __init__(self, executor: Executor, batches: Sequence[Feeds]) -> None:
        self.executor = executor
        self.batches = batches
        self.at = 0
        self.live: list[Env] = [{} for _ in batches]

    @torch.no_grad()
    def reach(self, cut: int, variant: Variant) -> None:
        """Go on to node `cut`, with the weights as they are now."""
        if cut <= self.at:
            return

        def go_on(i: int) -> Env:
            _, saved = self.executor.run(
                self.batches[i], variant, start=self.at, live=self.live[i], cuts=[cut], stop=cut
            )
            return saved[cut]

        for i, env in enumerate(side_by_side(go_on, range(len(self.batches)))):
            self.live[i] = env
        self.at = cut

    def values(
        self,
        i: int,
        names: Sequence[str],
        variant: Variant,
    ) -> dict[str, Tensor]:
        """Values of nodes of batch `i`, live here or a little further on."""
        live = self.live[i]
        found = {n: live[n] for n in names if n in live}
        wanted = {n: torch.empty(0) for n in names if n not in live}
        if wanted:
            self.executor.run(
                self.batches[i],
                variant,
                start=self.at,
                live=live,
                stop=max(map(self.executor.index, wanted)) + 1,
                captured=wanted,
            )
        return {**found, **wanted}


class _Run:
    """The dense and the compressed model, side by side."""

    def __init__(
        self,
        executor: Executor,
        levels: Levels,
        allocation: Allocation,
        batches: Sequence[Feeds],
    ) -> None:
        self.levels = levels
        self.allocation = allocation
        self.states = levels.states(allocation)
        self.batches = batches
        self.dense = _Walk(executor, batches)
        self.small = _Walk(executor, batches)

    def variant(self) -> Variant:
        return variant_of(self.allocation, self.states)

    def feed_back(self, modules: Sequence[str]) -> None:
        """Round these maps once more, with error feedback."""
        fed = self.levels.states(self.allocation, feedback=True)
        self.states.maps |= {m: fed.maps[m] for m in modules if m in fed.maps}

    def call(self, module: str) -> MapCall:
        return self.levels.calls[module]

    def each(self, function: Callable[[int], T]) -> Iterator[T]:
        """`function` of the number of every batch, in order."""
        with torch.no_grad():
            yield from side_by_side(function, range(len(self.batches)))

    def pick(self, i: int, call: MapCall, x: Tensor) -> Tensor:
        """The rows of batch `i` that count: tokens without padding, some patches."""
        held = self.batches[i].get("attention_mask")
        mask = None if held is None else held.bool()
        generator = torch.Generator().manual_seed(i)
        limit = PATCHES if call.convolution else None
        return data_rows(call, x, mask, limit=limit, generator=generator)


def _repair(
    run: _Run, site: Site, level: Level, where: _Sum, ridge: float, done: Collection[str]
) -> None:
    """Fit the consumer of a site; its producers but those `done`, which are fitted already."""
    consumer = site.consumers[0].module
    call = run.call(consumer)
    if consumer in run.states.constants:
        moved = run.levels.moved(consumer, run.allocation)
        run.states.constants[consumer] = moved.outputs(_mean_error(run, call, where))
        return
    if level.differs:
        _finish_producers(run, site, done)
    rounder = run.states.maps[consumer]
    base = _plain(run, consumer)
    matrix = matrices(call, base.weight)[0]
    outputs = run.levels.outputs(consumer, run.allocation)
    there = where.among(outputs)

    def of_batch(i: int) -> dict[str, _Moments]:
        target, x = _target(run, i, where, call, outputs)
        pick = run.pick(i, call, x)
        rows = input_rows(call, rounder.seen(x), pick)
        value = there.before(output_rows(call, target, pick))
        return {consumer: _Moments.of(rows, value - linear(rows, matrix, base.bias))}

    moments = _summed(run.each(of_batch))[consumer]
    change, shift = moments.correction(ridge, noise=run.levels.noise)
    weight = own_layout(call, (matrix.double() + change).float()[None], base.weight)
    shift = bias_of_rows(call, shift[None], base.weight)
    bias = shift if base.bias is None else base.bias.double() + shift
    fitted = _thinned(call, MapState(weight, bias, pattern=rounder.pattern), moments)
    at = _range(run, call, [matrices(call, fitted.weight)[0]], rounder, moments)
    run.states.maps[consumer] = _rounded(run, call, fitted, rounder.numeric, at, moments)


def _plain(run: _Run, module: str) -> MapState:
    """The weights of a map at its widths, dense and in fp32, for the inputs it will see."""
    plain = {n: Level(lv.width) for n, lv in run.allocation.levels.items()}
    names = run.levels.touching(module)
    made = run.levels.map_state(module, tuple((n, plain[n]) for n in names if n in plain))
    assert isinstance(made, MapState)
    moved = run.levels.moved(module, run.allocation)
    return replace(made, weight=moved.weight(run.call(module), made.weight))


def _finish_producers(run: _Run, site: Site, done: Collection[str]) -> None:
    """Thin out and round the producers from the inputs they will really see."""
    maps = {m: run.states.maps[m] for m in site.producers if m in run.states.maps and m not in done}
    held = {m: s for m, s in maps.items() if s.differs and run.call(m).groups == 1}
    calls = {m: run.call(m) for m in held}
    same: dict[tuple[object, ...], list[str]] = {}  # read the very same numbers
    for module, state in held.items():
        way = (calls[module].source, calls[module].window, state.activation)
        same.setdefault(way, []).append(module)
    groups = list(same.values())

    def of_batch(i: int) -> dict[str, _Moments]:
        read = run.small.values(i, [c.source for c in calls.values()], run.variant())
        found: dict[str, _Moments] = {}
        for first, *_ in groups:
            call = calls[first]
            x = held[first].seen(read[call.source])
            found[first] = _Moments.of(input_rows(call, x, run.pick(i, call, x)), None)
        return found

    moments = _summed(run.each(of_batch))
    for group in groups:
        seen, numeric = moments[group[0]], held[group[0]].numeric
        fitted = {
            m: _thinned(calls[m], replace(_plain(run, m), pattern=held[m].pattern), seen)
            for m in group
        }
        weights = [matrices(calls[m], s.weight)[0] for m, s in fitted.items()]
        at = _range(run, calls[group[0]], weights, held[group[0]], seen)
        for module, state in fitted.items():
            run.states.maps[module] = _rounded(run, calls[module], state, numeric, at, seen)


def _summed(parts: Iterable[dict[str, _Moments]]) -> dict[str, _Moments]:
    """Moments of all batches, by name."""
    total: dict[str, _Moments] = {}
    for part in parts:
        for name, moments in part.items():
            if name in total:
                total[name].add(moments)
            else:
                total[name] = moments
    return total


def _range(
    run: _Run, call: MapCall, weights: Sequence[Tensor], held: MapState, moments: _Moments
) -> ActivationRange | None:
    """The range of the input that maps (out, in) share, where theirs is a calibrated one.

    An image keeps its range: other convolutions read it by other windows.
    """
    if held.numeric != STATIC or call.convolution:
        return held.activation
    sample, matrix = torch.cat(moments.samples), torch.cat(list(weights))
    return calibrate(sample, matrix, signed=run.levels.signed)


def _thinned(call: MapCall, state: MapState, moments: _Moments) -> MapState:
    """A map in the pattern it is to have, from the inputs it sees."""
    if state.pattern == "dense":
        return state
    weight, bias = to_pattern(
        call,
        state.weight,
        state.bias,
        gram=moments.gram[None],
        total=moments.total[None],
        count=moments.count,
    )
    return replace(state, weight=weight, bias=bias)


def _rounded(
    run: _Run,
    call: MapCall,
    state: MapState,
    numeric: str,
    activation: ActivationRange | None,
    moments: _Moments,
) -> MapState:
    """Round a weight if its numeric does; the bias makes up for the mean of what that changes."""
    bias = state.bias
    made = replace(state, bias=None if bias is None else bias.float())
    if numeric != "fp32":
        made = run.levels.rounded(
            call, made.weight, made.bias, numeric, activation=activation, gram=moments.gram
        )
        made = replace(made, pattern=state.pattern)
        if bias is not None:
            mean = moments.total / moments.count
            lost = matrices(call, state.weight - made.weight)[0].double()
            made = replace(made, bias=(bias.double() + lost @ mean).float())
    return divided(call, made, run.levels.moved(call.module, run.allocation))


def _mean_error(run: _Run, call: MapCall, where: _Sum) -> Tensor:
    outputs = run.levels.outputs(call.module, run.allocation)

    def of_batch(i: int) -> tuple[Tensor, int]:
        value, _ = _target(run, i, where, call, outputs, reads=False)
        if call.convolution:
            rows = value.movedim(1, -1).flatten(0, -2)
        else:
            rows = value.flatten(0, -2)[run.pick(i, call, value)]
        rows = where.among(outputs).before(rows)
        return rows.sum(0, dtype=torch.float64), len(rows)

    total, count = torch.zeros(()), 0
    for part, rows in run.each(of_batch):
        total, count = total + part, count + rows
    return (total / count).float()


def _target(
    run: _Run, i: int, where: _Sum, call: MapCall, outputs: Tensor, *, reads: bool = True
) -> tuple[Tensor, Tensor]:
    """What the dense sum needs, in the channels that are left, beside the compressed model's
    residual; and what the map reads there."""
    target = run.dense.values(i, [where.total], Variant())[where.total]
    channels = 1 if call.convolution else -1
    if len(outputs) < target.shape[channels]:
        target = target.index_select(channels, outputs)
    names = [where.residual] if where.residual is not None else []
    found = run.small.values(i, [*names, *([call.source] if reads else [])], run.variant())
    if where.residual is not None:
        target = target - found[where.residual]
    return target, found[call.source] if reads else target


def _residual_sum(executor: Executor, site: Site, levels: Levels) -> _Sum | None:
    """Where the site's output joins the residual; its own output where nothing is added to it.

    A map that loses no inputs, and that nothing is added to, is not fitted: the last one of a
    language model would trade what its logits mean for their squares.
    """
    if site.calls != 1 or len(site.consumers) != 1:
        return None
    call = levels.calls[site.consumers[0].module]
    if call.groups > 1 or call.transposed:
        return None
    program = executor.program
    own = node = program.nodes[executor.index(call.node)]
    scale = shift = None
    while len(node.users) == 1:
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
                at = executor.index(user.name)
                return _Sum(user.name, others[0].name, at, scale, shift)
        break
    return None if site.kind == "map" else _Sum(own.name, None, executor.index(own.name))


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
