"""2:4 as a dimension of the levels: where it can be had, where it pays, and why not elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from zipc.core.request import Request
from zipc.core.types import Ladder, Level, Pattern, Site, Target
from zipc.prepare import Prepared
from zipc.pruner.sparse import refusal

SPARSE: Pattern = "2:4"


def offers_sparse(target: Target, request: Request) -> bool:
    """Whether sites of this request may be 2:4."""
    return SPARSE in target.patterns and request.pattern != "none"


def sparse_level(prepared: Prepared, site: Site, level: Level) -> Level | None:
    """The same level in 2:4; None where sparse kernels take no map of the site at its width."""
    if level.removed or not any(r is None for r in refusals(prepared, site, level).values()):
        return None
    return replace(level, pattern=SPARSE)


def refusals(prepared: Prepared, site: Site, level: Level) -> dict[str, str | None]:
    """By map of a site: why sparse kernels do not take it at a level, or None."""
    calls, weights = prepared.calls, prepared.weights
    integer = level.within(prepared.numeric).numeric.startswith("int8")
    found = {}
    for module in site.maps:
        call = calls[module]
        shape = list(weights[call.weight].shape)
        for piece in site.slices:
            if piece.parameter == call.weight:
                shape[piece.dim] -= sum(map(len, piece.index[level.width :]))
        found[module] = refusal(call, shape, integer=integer)
    return found


def asked_for(levels: Iterable[Level], *, units: int) -> list[Level]:
    """The levels of a site that is to be 2:4: such ones, removal, and dense where it has no other.

    A site without any keeps all its levels.
    """
    levels = list(levels)
    sparse = [lv for lv in levels if lv.pattern == SPARSE]
    if not sparse:
        return levels
    whole = max(lv.width for lv in sparse) == units
    return [lv for lv in levels if lv in sparse or lv.removed or (lv.width == units and not whole)]


def notes_on(
    prepared: Prepared,
    target: Target,
    request: Request,
    ladders: Mapping[str, Ladder],
    *,
    ms: Callable[[str, Level], float],
    doubted: float | None,
) -> list[str]:
    """What to tell about 2:4: how many sites may have it, and why the others may not.

    `ms` prices a level of a site; `doubted` is the factor by which a modelled gain may be off.
    """
    if request.pattern == "none":
        return []
    if target.only_dense is not None:
        return [f"2:4 is not offered: {target.only_dense}"]
    gains: list[float] = []
    reasons: list[str] = []
    for name, site in prepared.sites.items():
        whole = Level(site.units)
        sparse = sparse_level(prepared, site, whole)
        if sparse is None:
            found = refusals(prepared, site, whole)
            reasons.append("; ".join(f"{m}: {why}" for m, why in found.items()))
        else:
            gains.append(ms(name, whole) / ms(name, sparse))
    offered = sum(any(r.level.pattern == SPARSE for r in ld.rungs) for ld in ladders.values())
    notes = []
    if gains:
        told = f"2:4 is offered at {offered} of {len(ladders)} sites"
        told += f": a whole site gains {min(gains):.2f}x to {max(gains):.2f}x"
        if doubted is not None:
            told += f" by the model, whose error is a factor of {doubted:.2f}"
        notes.append(told)
    if reasons:
        notes.append(f"no sparse kernel takes {len(reasons)} sites whole, for one {reasons[0]}")
    return notes
