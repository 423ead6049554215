"""What an allocation does to the weights of every map: slice, refit, thin out, round; then kept.

A map may read the units of several sites and give those of others. Its columns are refitted for
all that is missing among its inputs together, and brought to a pattern; its rows are then cut, on
which neither depends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zipc.core.types import Allocation, Level, Site
from zipc.numerics import bf16
from zipc.numerics.bf16 import BF16
from zipc.numerics.int8 import STATIC, ActivationRange, calibrate, quantize_weight
from zipc.pruner.balance import Balance, Factors
from zipc.pruner.compensate import COMPENSATORS
from zipc.pruner.compensate.least_squares import INT8_NOISE, center
from zipc.pruner.evidence import InputStats
from zipc.pruner.graph.cuts import Cuts
from zipc.pruner.graph.interpret import Executor, Variant
from zipc.pruner.graph.mixtures import rerouted
from zipc.pruner.graph.passages import Passage
from zipc.pruner.graph.trace import MapCall
from zipc.pruner.maps import bias_of_rows, matrices, own_layout
from zipc.pruner.obs import Sweep
from zipc.pruner.sparse import refusal, to_pattern
from zipc.pruner.states import MapState, States, divided, variant_of

CACHE_BYTES = 2 << 26  # levels kept in memory: at least this, and
CACHE_MODELS = 3  # this many times the dense weights of all sites, so that a search never thrashes


Key = tuple[str, tuple[tuple[str, Level], ...], bool]


class Levels:
    """Weights of every map under any allocation, made on demand from orders and Gram matrices."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        calls: Mapping[str, MapCall],
        weights: Mapping[str, Tensor],
        stats: Mapping[str, InputStats],
        sweeps: Mapping[str, Sweep],
        *,
        weight_limit: int = 127,
        floats: str = "fp32",
        signed: bool = False,
        compensator: str = "least_squares",
        passages: Sequence[Passage] = (),
    ) -> None:
        """`floats` is what a level in fp32 runs in on the target; `signed`: its integers are S8.

        Channels that go through `passages` are evened out at levels with calibrated ranges.
        """
        self.sites = sites
        self.calls = calls
        self.weights = weights
        self.stats = stats
        self.sweeps = sweeps
        self.cuts = Cuts(sites.values())
        self._limit = weight_limit
        self._floats = floats
        self.signed = signed
        self.noise = INT8_NOISE if floats == STATIC else 0.0  # of inputs that are rounded later
        self._compensate = COMPENSATORS[compensator]
        self.passages = passages
        self._balance = Balance(passages, calls, weights, stats, limit=weight_limit, signed=signed)
        self._touching = {
            m: dict.fromkeys([*self.cuts.sites_of(c.weight), *self.cuts.sites_of(c.bias or "")])
            for m, c in calls.items()
        }
        owned = {p for c in calls.values() for p in (c.weight, c.bias)}
        self._others = [p for p in self.cuts.pieces if p not in owned]
        self._ranges: dict[tuple[str, bool], ActivationRange] = {}  # of what several maps read
        self._image_ranges: dict[tuple[str, tuple[int, ...]], ActivationRange] = {}
        self._sparse: dict[str, tuple[Tensor, Tensor | None]] = {}  # of maps with all their inputs
        self._cache: OrderedDict[Key, MapState | Tensor] = OrderedDict()
        dense = sum(_nbytes(weights[c.weight]) for m, c in calls.items() if self._touching[m])
        self._cache_bytes = max(CACHE_BYTES, CACHE_MODELS * dense)
        self._held = 0

    def kept(self, site: str, width: int) -> tuple[int, ...]:
        """Units kept, ascending."""
        order = self.sweeps[site].order
        return tuple(sorted(order[len(order) - width :]))

    def forget(self) -> None:
        """Drop the weights held in memory; they are made again when asked for."""
        self._cache.clear()
        self._sparse.clear()
        self._held = 0

    def states(self, allocation: Allocation, *, feedback: bool = False) -> States:
        """All weights under an allocation; `feedback` rounds with error feedback, slower."""
        kept = self._kept_units(
            tuple((n, lv) for n, lv in allocation.levels.items() if not lv.removed)
        )
        routes = rerouted((self.sites[n] for n in kept), kept)
        found = States(picks=routes.picks, dropped=routes.modules, silent=routes.ends)
        for module in routes.ends:
            weight = self.weights[self.calls[module].weight]
            outputs = self.outputs(module, allocation)
            found.constants[module] = weight.new_zeros(len(outputs))
        for module, names in self._touching.items():
            levels = tuple(
                (n, level)
                for n in names
                if (level := allocation.levels.get(n)) is not None
                and not (level.removed and self._passes_on(module, n))
            )
            if not levels or self.idle(module, allocation) or routes.gone(module):
                continue
            made = self.map_state(module, levels, feedback=feedback)
            if isinstance(made, MapState):
                found.maps[module] = made
            else:
                found.constants[module] = made
        for name in self._others:
            cut = self.cuts.cut(self.weights[name], name, kept)
            if cut.shape != self.weights[name].shape:
                found.tensors[name] = cut
        for name, by in self._balance.of_vectors(allocation.levels).items():
            held = found.tensors.get(name, self.weights[name])
            found.tensors[name] = held / self.cuts.cut(by, name, kept)
        return found

    def variant(self, allocation: Allocation, *, feedback: bool = False) -> Variant:
        """The whole model under an allocation."""
        return variant_of(allocation, self.states(allocation, feedback=feedback))

    def first_effect(self, executor: Executor, site: str) -> int:
        """Index of the first node that a change of the level of a site can affect."""
        return executor.first_effect(self.sites[site], also=self._balance.vectors(site))

    def touching(self, module: str) -> list[str]:
        """Names of the sites that cut a map."""
        return list(self._touching[module])

    def outputs(self, module: str, allocation: Allocation) -> Tensor:
        """Which of its dense outputs a map still gives."""
        call = self.calls[module]
        size = self.weights[call.weight].shape[call.out_dim]
        kept = self._kept_units(tuple(allocation.levels.items()))
        return self.cuts.stays(call.weight, call.out_dim, size, kept)

    def columns(self, module: str, allocation: Allocation) -> Tensor:
        """Which columns of its dense matrix a map still has."""
        call = self.calls[module]
        size = self.weights[call.weight].shape[call.in_dim]
        kept = self._kept_units(tuple(allocation.levels.items()))
        return _columns(call, self.cuts.stays(call.weight, call.in_dim, size, kept))

    def _passes_on(self, module: str, site: str) -> bool:
        """Whether a map is only run through by the units of a site, as a depthwise one is: around
        a removed site it stays as it was."""
        found = self.sites[site]
        return module not in found.maps

    def idle(self, module: str, allocation: Allocation) -> bool:
        """Whether nothing reads what a map gives: it produces units of a removed site."""
        return any(
            module in self.sites[n].producers and lv.removed for n, lv in allocation.levels.items()
        )

    def map_state(
        self, module: str, levels: tuple[tuple[str, Level], ...], *, feedback: bool = False
    ) -> MapState | Tensor:
        """A map at the levels of the sites it touches; a bias (out,) if no input is left."""
        key = (module, levels, feedback)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        made = self._make(module, levels, feedback)
        self._cache[key] = made
        self._held += _nbytes(made)
        while self._held > self._cache_bytes and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._held -= _nbytes(old)
        return made

    def _followed(self, module: str, levels: tuple[tuple[str, Level], ...]) -> Level:
        """Whose numeric and pattern a map has: the site it produces, else the one it consumes."""
        own = [lv for n, lv in levels if module in self.sites[n].producers]
        return (own or [lv for _, lv in levels])[0]

    def _kept_units(self, levels: tuple[tuple[str, Level], ...]) -> dict[str, tuple[int, ...]]:
        return {n: self.kept(n, lv.width) for n, lv in levels if lv.width < self.sites[n].units}

    def _make(
        self, module: str, levels: tuple[tuple[str, Level], ...], feedback: bool
    ) -> MapState | Tensor:
        call = self.calls[module]
        weight = self.weights[call.weight]
        bias = None if call.bias is None else self.weights[call.bias]
        kept = self._kept_units(levels)
        inputs = self.cuts.stays(call.weight, call.in_dim, weight.shape[call.in_dim], kept)
        outputs = self.cuts.stays(call.weight, call.out_dim, weight.shape[call.out_dim], kept)
        level = self._followed(module, levels)
        shape = list(weight.shape)
        shape[call.in_dim], shape[call.out_dim] = len(inputs), len(outputs)
        integer = level.within(self._floats).numeric.startswith("int8")
        pattern = "dense" if refusal(call, shape, integer=integer) else level.pattern
        if len(inputs) < weight.shape[call.in_dim]:
            weight, bias = self._refitted(call, weight, bias, inputs)
        if pattern != "dense":
            weight, bias = self._thinned(call, weight, bias, inputs)
        if bias is not None and len(outputs) < len(bias) == weight.shape[call.out_dim]:
            bias = bias[outputs]
        elif bias is not None and call.bias is not None:
            bias = self.cuts.cut(bias, call.bias, kept)
        moved = self._balance.at(module, dict(levels), inputs=inputs, outputs=outputs)
        if not len(inputs):
            assert bias is not None
            return moved.outputs(bias)
        weight = moved.weight(call, weight.index_select(call.out_dim, outputs))
        numeric = level.numeric if call.rounds else "fp32"  # a depthwise one is passed through
        if numeric == "fp32":
            return divided(call, MapState(weight, bias, pattern=pattern), moved)
        if numeric == BF16:
            made = self.rounded(call, weight, bias, numeric, activation=None, gram=None)
            return divided(call, replace(made, pattern=pattern), moved)
        held, columns = self.stats[module], _columns(call, inputs)
        activation = None
        if numeric == STATIC and call.convolution:
            activation = self._range_of_images(call, inputs)
        elif numeric == STATIC and len(inputs) < held.sample.shape[1]:
            seen, matrix = moved.inputs(held.sample[:, inputs]), matrices(call, weight)[0]
            activation = calibrate(seen, matrix, signed=self.signed)
        elif numeric == STATIC:
            activation = self._shared_range(call, moved)
        gram = moved.gram(held.gram[0][columns][:, columns]) if feedback else None
        made = self.rounded(call, weight, bias, numeric, activation=activation, gram=gram)
        return divided(call, replace(made, pattern=pattern), moved)

    def moved(self, module: str, allocation: Allocation) -> Factors:
        """What is moved at a map from or to others of its sites."""
        inputs, outputs = self.columns(module, allocation), self.outputs(module, allocation)
        return self._balance.at(module, allocation.levels, inputs=inputs, outputs=outputs)

    def _shared_range(self, call: MapCall, moved: Factors) -> ActivationRange:
        """A range for all linear maps that read what `call` reads: they share its rounding, and
        what is moved from its channels."""
        key = (call.source, moved.columns is not None)
        if key not in self._ranges:
            readers = [
                c
                for c in self.calls.values()
                if c.source == call.source and not c.convolution and c.module in self.stats
            ]
            weights = [moved.weight(c, self.weights[c.weight]) for c in readers]
            matrix = torch.cat([matrices(c, w)[0] for c, w in zip(readers, weights, strict=True)])
            sample = moved.inputs(self.stats[call.module].sample)
            self._ranges[key] = calibrate(sample, matrix, signed=self.signed)
        return self._ranges[key]

    def _range_of_images(self, call: MapCall, inputs: Tensor) -> ActivationRange:
        """A range for all convolutions that read what `call` reads, in the channels left of it.

        Where an image goes to several of them, TensorRT rounds it once only if their scales agree:
        the widest of those that suit one each.
        """
        key = (call.source, tuple(inputs.tolist()))
        if key not in self._image_ranges:
            readers = [
                c
                for c in self.calls.values()
                if c.source == call.source and c.convolution and c.plain and c.module in self.stats
            ]
            ranges = []
            for reader in readers:
                columns = _columns(reader, inputs)
                seen = self.stats[reader.module].sample[:, columns]
                matrix = matrices(reader, self.weights[reader.weight])[0][:, columns]
                ranges.append(calibrate(seen, matrix, signed=self.signed))
            self._image_ranges[key] = max(ranges, key=lambda at: at.scale)
        return self._image_ranges[key]

    def _refitted(
        self, call: MapCall, weight: Tensor, bias: Tensor | None, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Columns fitted to stand in for those that are gone."""
        held = self.stats[call.module]
        columns = _columns(call, inputs)
        parts, shifts = [], []
        for W, gram, total in zip(
            matrices(call, weight), held.gram, held.total, strict=True
        ):  # (out, in)
            centred, mean = center(gram, total, held.count, noise=self.noise)
            fitted, shift = self._compensate(W, None, centred, mean, keep=columns)
            parts.append(fitted)
            shifts.append(shift)
        shift = bias_of_rows(call, torch.stack(shifts), weight).to(weight.dtype)
        fitted = own_layout(call, torch.stack(parts), weight)
        return fitted, shift if bias is None else bias + shift

    def _thinned(
        self, call: MapCall, weight: Tensor, bias: Tensor | None, inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """All rows in the 2:4 pattern, fitted to the inputs that are left."""
        held = self.stats[call.module]
        columns = _columns(call, inputs)
        whole = len(columns) == held.gram.shape[-1]
        if whole and call.module in self._sparse:
            return self._sparse[call.module]
        made = to_pattern(
            call,
            weight,
            bias,
            gram=held.gram[:, columns][:, :, columns],
            total=held.total[:, columns],
            count=held.count,
        )
        if whole:
            self._sparse[call.module] = made
        return made

    def rounded(
        self,
        call: MapCall,
        weight: Tensor,
        bias: Tensor | None,
        numeric: str,
        *,
        activation: ActivationRange | None,
        gram: Tensor | None,
    ) -> MapState:
        """A map in bf16, INT8 or INT4; static INT8 has a calibrated range of its input.

        Rounding errors of integers are fed back where `gram` (in, in) is given.
        """
        if numeric == BF16:
            return MapState(bf16.rounded(weight), bias, numeric)
        matrix = matrices(call, weight)[0]
        integer = quantize_weight(matrix, numeric=numeric, gram=gram, limit=self._limit)
        stands_for = own_layout(call, integer.dequantized()[None], weight)
        return MapState(stands_for, bias, numeric, integer, activation)


def _columns(call: MapCall, inputs: Tensor) -> Tensor:
    """Columns of a map's matrix that the channels `inputs` own."""
    return (inputs[:, None] * call.kernel + torch.arange(call.kernel)).flatten()


def _nbytes(made: MapState | Tensor) -> int:
    if isinstance(made, Tensor):
        return made.numel() * made.element_size()
    integers = 0 if made.integer is None else _nbytes(made.integer.values)
    return _nbytes(made.weight) + integers
