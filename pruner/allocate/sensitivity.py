"""What each level of one site alone costs the oracle: the scale on which the program adds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from zipc.core.types import Allocation, Ladder, Level, Numeric, Pattern, Site

Style = tuple[Numeric, Pattern]
PLAIN: Style = ("fp32", "dense")
NO_ERROR = 1e-6  # below it errors do not tell widths apart
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
        of_width = _along(errors, points)
        extra = {
            style: max(probe(Level(width, *style)) - of_width[width], 0.0)
            for style, width in sorted(widest.items())
        }
        found[name] = {
            lv: of_width[lv.width] + (0.0 if lv.removed else extra[lv.numeric, lv.pattern])
            for lv in levels
        }
    return found


def _along(errors: Mapping[int, float], points: Mapping[int, float]) -> dict[int, float]:
    """The loss of every width: straight lines along the error between the widths in `points`.

    Where fewer rows were seen than there are units, many widths have no error: between two of the
    same error the line goes by width.
    """
    found, worst = dict(points), 0.0
    probed = sorted(points, reverse=True)
    for wide, narrow in itertools.pairwise(probed):
        start, worst = worst, max(worst, points[narrow])
        rise = errors[narrow] - errors[wide]
        for width in (w for w in errors if narrow <= w < wide):
            share = (wide - width) / (wide - narrow)
            if rise > NO_ERROR:
                share = min(max((errors[width] - errors[wide]) / rise, 0.0), 1.0)
            found[width] = start + share * (worst - start)
    return found


def probe_count(ladders: Mapping[str, Ladder]) -> int:
    """How many oracle evaluations `site_losses` makes at most."""
    styles = [
        {(r.level.numeric, r.level.pattern) for r in ld.rungs if not r.level.removed}
        for ld in ladders.values()
    ]
    return sum(len(PROBES) + len(found) for found in styles)
