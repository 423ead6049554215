"""Whole-model correction: what a sum of site prices gets wrong about the latency of a whole graph.

Latency adds over sites only roughly: weights that were hot in the cache during the sweep are not
in the whole graph, and what no site owns has a price of its own. A line from predicted to measured
ratio (both to the undiminished graph) is fitted on a few random allocations. It stays near (1, 1),
where that graph is by definition. Where parts are timed with cold caches, small models, whose
weights a cache holds, are another matter: the line may have a bend there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

MIN_SLOPE, MAX_SLOPE = 0.5, 2.0
DENSE_TOLERANCE = 0.08  # how far from 1 the line may read at the dense point: a model whose layers
# differ in width may take more than one of equal layers (MiniLM under OpenVINO: 6 %)
UNSEEN = 0.015  # by so much, relative, a machine differs from itself minutes later
BENT_POINTS, BENT_ENDS = 12, 3  # how many show a bend, and how many of them on either side of it
BENT_ERROR = 0.8  # of what a straight line leaves of the mean error of left-out points
MIN_SHARE = 0.5  # of the smallest predicted ratio: what the line must leave of it

Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Point = tuple[float, float]  # (predicted ratio, measured ratio)


class Line(NamedTuple):
    """Straight, or steeper below a bend."""

    intercept: float
    slope: float
    bend: float = 0.0
    steeper: float = 0.0

    def at(self, predicted: float) -> float:
        below = max(self.bend - predicted, 0.0)
        return self.intercept + self.slope * predicted - self.steeper * below


SAME = Line(0.0, 1.0)  # measured is what is predicted


class Correction(BaseModel):
    """measured ratio ≈ intercept + slope · predicted ratio, steeper below a bend.

    Errors are relative and read on points left out of the fit, one at a time: an honest estimate
    of what the next allocation will see.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    intercept: float = Field(allow_inf_nan=False)
    slope: float = Field(ge=MIN_SLOPE, le=MAX_SLOPE)
    bend: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    steeper: float = Field(default=0.0, allow_inf_nan=False)
    points: tuple[tuple[Ratio, Ratio], ...] = Field(min_length=1)
    median_error: float = Field(ge=0, allow_inf_nan=False)
    worst_error: float = Field(ge=0, allow_inf_nan=False)
    each_ms: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # what every call of a site that
    # is not removed takes beyond its price: predicted ratios are with it

    @property
    def n(self) -> int:
        return len(self.points)

    @property
    def reach(self) -> float:
        """Half of the 95 % interval of the logarithm of a predicted ratio.

        By Student's t over the left-out errors, as wide as so few points demand, and what they
        cannot show, since they are timed at one time.
        """
        from scipy.special import stdtrit  # slow to import, and few callers need it

        errors = _left_out_errors(self.points, self.bend)
        squares = fmean(math.log1p(error) ** 2 for error in errors)
        return float(stdtrit(self.n, 0.975)) * math.sqrt(squares + UNSEEN**2)

    def apply(self, ratio: float) -> float:
        """Predict the measured ratio. Monotone, and positive for every positive `ratio`."""
        knee = self._knee
        if ratio >= knee:
            return self._line.at(ratio)
        return ratio * self._line.at(knee) / knee

    def invert(self, ratio: float) -> float:
        """Predicted ratio at which the measured one is `ratio`; may be <= 0: out of reach."""
        knee = self._knee
        straight = (ratio - self.intercept) / self.slope
        if straight < self.bend:
            straight = self.bend + (ratio - self._line.at(self.bend)) / (self.slope + self.steeper)
        if straight >= knee:
            return straight
        return ratio * knee / self._line.at(knee)

    @property
    def _line(self) -> Line:
        return Line(self.intercept, self.slope, self.bend, self.steeper)

    @property
    def _knee(self) -> float:
        """Where a line with a negative intercept turns towards the origin: the smallest point.

        Beyond the points such a line would promise ever more, and in the end negative latencies.
        """
        return min(p for p, _ in self.points) if self._line.at(0.0) < 0 else 0.0


def fit(points: Iterable[Point], *, may_bend: bool = False) -> Correction:
    """Fit the line of least absolute relative deviations over the points and the dense point.

    The slope is held in [0.5, 2], the line within 8 % of (1, 1), and no point is predicted below
    half of its sum of prices. Least absolute deviations is a linear program in two variables, so
    the optimum is at a vertex: all of them are tried. Of 12 points or more a line that `may_bend`
    does so at one of them where that predicts left-out points much better.

    Raises:
        ValueError: no points, or one that is not positive and finite.
    """
    cloud = tuple((float(p), float(m)) for p, m in points)
    if not cloud or not all(0 < x < float("inf") for point in cloud for x in point):
        raise ValueError(f"a correction needs positive, finite points, not {cloud}")
    bend, errors = 0.0, _left_out_errors(cloud)
    if may_bend and len(cloud) >= BENT_POINTS:
        enough = BENT_ERROR * fmean(errors)
        for at in sorted(p for p, _ in cloud)[BENT_ENDS:-BENT_ENDS]:
            bent = _left_out_errors(cloud, at)
            if fmean(bent) < enough:
                bend, errors, enough = at, bent, fmean(bent)
    return Correction(
        **_least_absolute(cloud, bend)._asdict(),
        points=cloud,
        median_error=median(errors),
        worst_error=max(errors),
    )


def _least_absolute(cloud: Sequence[Point], bend: float) -> Line:
    return _least_absolute_bent(cloud, bend) if bend else _least_absolute_line(cloud)


def _least_absolute_bent(cloud: Sequence[Point], bend: float) -> Line:
    """The same with a bend, as a linear program: every deviation is what it is above less what it
    is below."""
    from scipy.optimize import linprog  # slow to import, and few callers need it

    def basis(predicted: float) -> list[float]:
        return [1.0, predicted, -max(bend - predicted, 0.0)]  # intercept, slope, steeper

    points = [*cloud, (1.0, 1.0)]
    count = len(points)
    weights = [1 / m for _, m in points]
    smallest = min(p for p, _ in cloud)
    limits = [
        (basis(1.0), 1 + DENSE_TOLERANCE),
        ([-x for x in basis(1.0)], DENSE_TOLERANCE - 1),
        ([-x for x in basis(smallest)], -MIN_SHARE * smallest),
        ([0.0, 1.0, 1.0], MAX_SLOPE),
        ([0.0, -1.0, -1.0], -MIN_SLOPE),
    ]
    unit = [[float(i == j) for j in range(count)] for i in range(count)]
    found = linprog(
        c=[0.0, 0.0, 0.0, *weights, *weights],
        A_eq=[
            [*basis(p), *(-x for x in row), *row] for (p, _), row in zip(points, unit, strict=True)
        ],
        b_eq=[m for _, m in points],
        A_ub=[[*row, *[0.0] * (2 * count)] for row, _ in limits],
        b_ub=[most for _, most in limits],
        bounds=[(None, None), (MIN_SLOPE, MAX_SLOPE), (None, None), *[(0, None)] * (2 * count)],
    )
    assert found.x is not None, found.message  # measured = predicted is always legal
    intercept, slope, steeper = (float(x) for x in found.x[:3])
    return Line(intercept, min(max(slope, MIN_SLOPE), MAX_SLOPE), bend, steeper)


def _least_absolute_line(cloud: Sequence[Point]) -> Line:
    smallest = min(p for p, _ in cloud)
    points = [*cloud, (1.0, 1.0)]
    limits = [(1.0, 1 - DENSE_TOLERANCE), (1.0, 1 + DENSE_TOLERANCE)]
    limits.append((smallest, MIN_SHARE * smallest))
    pivots = [*points, *limits]
    lines = [_through(a, b) for a, b in combinations(pivots, 2) if a[0] != b[0]]
    lines += [Line(m - slope * p, slope) for p, m in pivots for slope in (MIN_SLOPE, MAX_SLOPE)]
    legal = [line for line in lines if _is_legal(line, smallest)]
    return min([SAME, *legal], key=lambda line: (_deviation(line, points), abs(line.intercept)))


def _through(a: Point, b: Point) -> Line:
    slope = (b[1] - a[1]) / (b[0] - a[0])
    return Line(a[1] - slope * a[0], slope)


def _is_legal(line: Line, smallest: float) -> bool:
    return (
        MIN_SLOPE <= line.slope <= MAX_SLOPE
        and abs(line.at(1.0) - 1) <= DENSE_TOLERANCE + 1e-12
        and line.at(smallest) >= MIN_SHARE * smallest - 1e-12
    )


def _deviation(line: Line, points: Sequence[Point]) -> float:
    return sum(abs(line.at(p) - m) / m for p, m in points)


def _left_out_errors(cloud: Sequence[Point], bend: float = 0.0) -> list[float]:
    errors = []
    for index, point in enumerate(cloud):
        rest = [*cloud[:index], *cloud[index + 1 :]]
        line = _least_absolute(rest, bend) if rest else SAME
        errors.append(_deviation(line, [point]))
    return errors
