"""Which levels of a site a target is priced at."""

from __future__ import annotations

from zipc.core.types import Level, Site, Target
from zipc.patterns import SPARSE, sparse_level
from zipc.prepare import Prepared
from zipc.pruner.ladder import widths_of


def offered_levels(prepared: Prepared, site: Site, target: Target) -> list[Level]:
    """Every level the table prices for a site, the dense one included."""
    widths = widths_of(site, step=target.width_step)
    integers = prepared.on_integers(site)
    numerics = [n for n in target.numerics if integers or not Level(site.units, n).differs]
    if prepared.body is not None:
        numerics = [prepared.numeric]
    levels = [Level(w, n) for n in numerics for w in widths if w]
    if SPARSE in target.patterns:
        sparse = (sparse_level(prepared, site, lv) for lv in levels)
        levels += [lv for lv in sparse if lv is not None]
    removed = [Level(0)] if site.removable else []
    return [*removed, *(lv for lv in levels if suits(lv, site, target))]


def suits(level: Level, site: Site, target: Target) -> bool:
    """Whether a level is on the target's grid; heads and experts are whole, dense is offered."""
    return site.kind in ("heads", "experts") or level.width == site.units or target.on_grid(level)


def float_widths(prepared: Prepared, site: Site, target: Target) -> list[int]:
    """Widths of a site, ascending, that suit what it runs in where its level says nothing else."""
    widths = widths_of(site, step=target.width_step)
    return [w for w in widths if suits(Level(w, prepared.numeric), site, target)]
