"""What each level of one site alone costs the oracle: the scale on which the program adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from zipc.core.types import Allocation, Ladder, Level, Site

PROBES = (0.0, 0.25, 0.5, 0.75)  # widths probed, as shares of the dense width


def site_losses(
    sites: Mapping[str, Site],
    ladders: Mapping[str, Ladder],
    *,
    score: Callable[[Allocation], float],
    on_probe: Callable[[], None],
) -> dict[str, dict[Level, float]]:
    """Oracle loss of every level of every site, the other sites dense.

    Widths are probed at a few points and interpolated along the ladder's error; a numeric is probed
    at full width, and its loss is added to that of the width.
    """
    found: dict[str, dict[Level, float]] = {}
    for name, ladder in ladders.items():
        levels = [r.level for r in ladder.rungs]
        errors = {r.level.width: r.error for r in ladder.rungs}
        units = sites[name].units
        widths = sorted(errors)
        reference = next((lv.numeric for lv in levels if lv.width == units), "fp32")
        reference = "fp32" if any(lv.numeric == "fp32" for lv in levels) else reference
        numerics = sorted({lv.numeric for lv in levels if not lv.removed})

        def probe(level: Level, name: str = name) -> float:
            loss = score(Allocation({name: level}, 0.0, 0.0))
            on_probe()
            return max(loss, 0.0)

        dense = {n: probe(Level(units, n)) if n != "fp32" else 0.0 for n in numerics}
        points = {units: 0.0}
        for share in PROBES:
            width = min(widths, key=lambda w: abs(w - share * units))
            if width not in points and width < units:
                level = Level(width, reference) if width else Level(0)
                points[width] = max(probe(level) - dense.get(reference, 0.0), 0.0)
        x = np.array([errors[w] for w in sorted(points, reverse=True)])
        y = np.maximum.accumulate([points[w] for w in sorted(points, reverse=True)])
        found[name] = {
            lv: float(np.interp(errors[lv.width], x, y))
            + (dense[lv.numeric] if not lv.removed else 0.0)
            for lv in levels
        }
    return found


def probe_count(ladders: Mapping[str, Ladder]) -> int:
    """How many oracle evaluations `site_losses` makes at most."""
    numerics = [
        {r.level.numeric for r in ld.rungs if not r.level.removed} for ld in ladders.values()
    ]
    return sum(len(PROBES) + len(n) for n in numerics)
