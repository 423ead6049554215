"""Try out whether a module of the user's own code follows when its sites shrink.

The traced graph says exactly what removing units must give. The module's code may say otherwise: a
number of heads kept in an attribute, a width written into a `split`. Attributes that hold such
sizes are found by trying, and a site at which the module still disagrees with the graph is left
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zipc.core.types import Site
from zipc.pruner.graph.as_traced import AsTraced, units_of
from zipc.pruner.graph.cuts import Cuts, Kept
from zipc.pruner.graph.interpret import Executor, Variant
from zipc.pruner.graph.mixtures import Rerouted, rerouted
from zipc.pruner.graph.sites import Rewrite, Structure, without
from zipc.pruner.graph.surgery import attribute_candidates, describe, reshaped
from zipc.pruner.graph.trace import Program

AGREES = 1e-4  # norm of the difference of the outputs, relative to the norm
TOGETHER = 4  # groups in which the removal of sites is tried, every fourth site in one


def verify(
    model: nn.Module, program: Program, structure: Structure, example: Mapping[str, Tensor]
) -> Structure:
    """Return the structure with the attributes to rewrite, and without sites that do not follow.

    Sites are tried in groups such that each is once cut without any other that it might only come
    out right beside; one by one only where a group fails. A model on the meta device has no
    values: there only the shapes are compared.
    """
    trial = _Trial(model, program, example)
    every_site = [_with_attributes(model, structure, s, every=False) for s in structure.sites]
    found = _joined(structure, every_site)
    streams = [s for s in found.sites if s.normed]
    groups = [_all_but_first(g) for g in _separating([s for s in found.sites if not s.normed])]
    groups.append(_every_second(streams))  # they cut every tensor: to half, once, is fast
    if any(trial.failure(found, kept) for kept in groups):
        found = _each_alone(trial, structure, every_site)
    if trial.failure_together(found, found.sites) is not None:
        found = _one_by_one(trial, found)
    stuck = set(_stuck(trial, found))
    sites = [replace(s, removable=s.removable and s.name not in stuck) for s in found.sites]
    return replace(found, sites=sites)


def _separating(sites: Sequence[Site]) -> Iterator[Sequence[Site]]:
    """Groups of sites; for every two there is one with the first and without the second."""
    for bit in range(len(sites).bit_length()):
        for value in (0, 1):
            yield [s for i, s in enumerate(sites) if (i >> bit & 1) == value]


def _kept(sites: Sequence[Site], units: Callable[[Site], Sequence[int]]) -> Kept:
    """The units named, and as many more as must stay; sites that lose nothing are left out."""
    found = {}
    for site in sites:
        named = units(site)
        others = [u for u in reversed(range(site.units)) if u not in named]
        named = sorted([*named, *others[: max(0, site.least - len(named))]])
        if len(named) < site.units:
            found[site.name] = named
    return found


def _each_alone(trial: _Trial, structure: Structure, plain: Sequence[Structure]) -> Structure:
    """The sites that follow without any other, with whichever attributes that takes."""
    followed: list[Structure] = []
    reasons: dict[str, str] = {}
    for site, tried in zip(structure.sites, plain, strict=True):
        failure = trial.failure(tried, _all_but_first([site]))
        if failure is not None:
            tried = _with_attributes(trial.model, structure, site, every=True)
            if trial.failure(tried, _all_but_first([site])) is not None:
                reason = f"the code of the module does not follow its width: {failure}"
                reasons[site.name] = reason
                continue
        followed.append(tried)
    return without(_joined(structure, followed), reasons)


def _joined(structure: Structure, parts: Sequence[Structure]) -> Structure:
    rewrites = dict.fromkeys(r for part in parts for r in part.attributes)
    return replace(structure, attributes=tuple(rewrites))


def _stuck(trial: _Trial, structure: Structure) -> Iterator[str]:
    """Sites without which the module fails, or whose loss would leave outputs of nothing but
    constants, of those that the graph could do without."""
    executor = Executor(trial.program, structure)
    removable = [s for s in structure.sites if s.removable]
    vital = {s.name for s in removable if _cuts_off(executor, s)}
    yield from vital
    removable = [s for s in removable if s.name not in vital]
    for start in range(TOGETHER):
        group = removable[start::TOGETHER]
        if trial.failure(structure, {s.name: [] for s in group}) is None:
            continue
        yield from (s.name for s in group if trial.failure(structure, {s.name: []}) is not None)


def _cuts_off(executor: Executor, site: Site) -> bool:
    """Whether no output depends on any input once a site is gone."""
    bias = torch.empty(0)
    without_it = Variant(constants={c.module: bias for c in site.consumers})
    return not executor.reads_inputs(without_it)


def _one_by_one(trial: _Trial, structure: Structure) -> Structure:
    """Sites that follow alone but not together: keep those that do, in order."""
    kept: list[Site] = []
    reasons: dict[str, str] = {}
    for site in structure.sites:
        failure = trial.failure_together(structure, [*kept, site])
        if failure is None:
            kept.append(site)
        else:
            reasons[site.name] = f"its module does not follow beside other sites: {failure}"
    return without(structure, reasons)


def _all_but_first(sites: Sequence[Site]) -> Kept:
    return _kept([s for s in sites if s.units > 1], lambda s: range(1, s.units))


def _every_second(sites: Sequence[Site]) -> Kept:
    return _kept(sites, lambda s: range(0, s.units, 2))


def _with_attributes(
    model: nn.Module, structure: Structure, site: Site, *, every: bool
) -> Structure:
    if isinstance(model, AsTraced):
        return replace(structure, attributes=(Rewrite("", units_of(site.name), site.name, 1),))
    rewrites = tuple(
        Rewrite(module, attribute, site.name, factor)
        for module, attribute, factor in attribute_candidates(model, site, every=every)
    )
    return replace(structure, attributes=rewrites)


@dataclass(frozen=True, slots=True)
class _Trial:
    """What a module is tried out with."""

    model: nn.Module
    program: Program
    example: Mapping[str, Tensor]

    def failure_together(self, structure: Structure, sites: Sequence[Site]) -> str | None:
        """What goes wrong when all of `sites` shrink by one unit, to half or to one unit."""
        several = [s for s in sites if s.units > 1]
        last = _kept(several, lambda s: [s.units - 1])
        for kept in (_all_but_first(sites), _every_second(several), last):
            failure = self.failure(structure, kept)
            if failure is not None:
                return failure
        return None

    def failure(self, structure: Structure, kept: Kept) -> str | None:
        """What goes wrong when only the units `kept` are left; None: nothing."""
        if not kept:
            return None
        widths = {name: len(units) for name, units in kept.items()}
        routes = rerouted(structure.sites, kept)
        tensors, constants = self._weights(structure, kept, routes)
        own = tuple(a for a in structure.attributes if a.site in kept)
        document = describe(
            self.model,
            self.program,
            replace(structure, attributes=own),
            widths=widths,
            dropped=routes.modules,
        )
        with torch.no_grad():
            try:
                made = reshaped(self.model, document)
                stubs = document["stubs"]
                there = {n: t for n, t in tensors.items() if not routes.gone(n)}
                _assign_(
                    made, {n: t for n, t in there.items() if n.rpartition(".")[0] not in stubs}
                )
                biases = [p for p, stub in stubs.items() if stub["kind"] == "constant"]
                _assign_(made, {f"{path}.bias": constants[path] for path in biases})
                got = _outputs(self.program, made(**self.example))
            except Exception as error:  # whatever the code of a module raises
                first = str(error).strip().splitlines()[0] if str(error).strip() else ""
                return f"{type(error).__name__}: {first[:160]}"
            variant = Variant(
                tensors=tensors, constants=constants, widths=widths, picks=routes.picks
            )
            want, _ = Executor(self.program, structure).run(self.example, variant)
        if [t.shape for t in got] != [t.shape for t in want]:
            return "its outputs have other shapes"
        if any(t.is_meta for t in got):
            return None
        for a, b in zip(got, want, strict=True):
            apart = float(torch.linalg.vector_norm((a - b).double()))
            if not apart <= AGREES * float(torch.linalg.vector_norm(b.double())) + 1e-12:
                return "it computes something else"
        return None

    def _weights(
        self, structure: Structure, kept: Kept, routes: Rerouted
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors by name, and what the consumers of removed sites and experts give."""
        weights = dict(self.program.tensors.values())
        cuts = Cuts(s for s in structure.sites if kept.get(s.name))
        tensors = {n: cuts.cut(weights[n], n, kept) for n in cuts.pieces}
        gone = {
            consumer.module
            for site in structure.sites
            if site.name in kept and not kept[site.name]
            for consumer in site.consumers
        }.union(routes.ends)
        constants: dict[str, Tensor] = {}
        for call in self.program.maps:
            if call.module in gone:
                weight = tensors.get(call.weight, weights[call.weight])
                zeros = weight.new_zeros(weight.shape[call.out_dim])
                if call.bias is None:
                    constants[call.module] = zeros
                else:
                    constants[call.module] = tensors.get(call.bias, weights[call.bias])
        return tensors, constants


def _outputs(program: Program, result: Any) -> list[Tensor]:
    """Of the tensors that the module gives, those that are the program's outputs."""
    given = [t.detach() for t in tree_leaves(result) if isinstance(t, Tensor)]
    names = [n for n in program.exported.graph_signature.user_outputs if isinstance(n, str)]
    return [given[names.index(output.name)] for output in program.outputs]


def _assign_(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in tensors.items():
            owner, _, leaf = name.rpartition(".")
            getattr(module.get_submodule(owner), leaf).data = value
