"""What each level of one site alone costs the oracle: the scale on which the program adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from zipc.core.types import Allocation, Ladder, Level, Numeric, Pattern, Site

Style = tuple[Numeric, Pattern]
PLAIN: Style = ("fp32", "dense")
PROBES = (0.0, 0.25, 0.5, 0.75)  # widths probed, as shares of the dense width


def site_losses(
    sites: Mapping[str, Site],
    ladders: Mapping[str, Ladder],
    *,
    score: Callable[[Allocation], float],
    on_probe: Callable[[], None],
) -> dict[str, dict[Level, float]]:
    """Oracle loss of every level of every site, the other sites dense.

    Widths are probed at a few points and interpolated along the ladder's error; a style, numeric
    and pattern, is probed at the largest width it is offered at, and what it loses there beyond the
    width is added to that of every width.
    """
    found: dict[str, dict[Level, float]] = {}
    for name, ladder in ladders.items():
        levels = [r.level for r in ladder.rungs]
        errors = {r.level.width: r.error for r in ladder.rungs}
        units = sites[name].units
        widths = sorted(errors)
        widest: dict[Style, int] = {}
        for level in levels:
            if not level.removed:
                style = (level.numeric, level.pattern)
                widest[style] = max(level.width, widest.get(style, 0))
        whole = [style for style, width in widest.items() if width == units]
        reference = PLAIN if PLAIN in widest else min(whole, default=PLAIN)
        memo: dict[Level, float] = {Level(units): 0.0}

        def probe(level: Level, name: str = name, memo: dict[Level, float] = memo) -> float:
            if level not in memo:
                memo[level] = max(score(Allocation({name: level}, 0.0, 0.0)), 0.0)
                on_probe()
            return memo[level]

        base = probe(Level(units, *reference))
        points = {units: 0.0}
        for share in PROBES:
            width = min(widths, key=lambda w: abs(w - share * units))
            if width not in points and width < units:
                level = Level(width, *reference) if width else Level(0)
                points[width] = max(probe(level) - base, 0.0)
        x = np.array([errors[w] for w in sorted(points, reverse=True)])
        y = np.maximum.accumulate([points[w] for w in sorted(points, reverse=True)])
        of_width = {w: float(np.interp(error, x, y)) for w, error in errors.items()}
        extra = {
            style: max(probe(Level(width, *style)) - of_width[width], 0.0)
            for style, width in sorted(widest.items())
        }
        found[name] = {
            lv: of_width[lv.width] + (0.0 if lv.removed else extra[lv.numeric, lv.pattern])
            for lv in levels
        }
    return found


def probe_count(ladders: Mapping[str, Ladder]) -> int:
    """How many oracle evaluations `site_losses` makes at most."""
    styles = [
        {(r.level.numeric, r.level.pattern) for r in ld.rungs if not r.level.removed}
        for ld in ladders.values()
    ]
    return sum(len(PROBES) + len(found) for found in styles)
