"""Whole-model correction: what a sum of site prices gets wrong about the latency of a whole graph.

Latency adds over sites only roughly: weights that were hot in the cache during the sweep are not
in the whole graph, and what no site owns has a price of its own. A line from predicted to measured
ratio (both to the undiminished graph) is fitted on a few random allocations. It stays near (1, 1),
where that graph is by definition. Where parts are timed with cold caches, small models, whose
weights a cache holds, are another matter: the line may have a bend there. And a processor runs
integers at another pace, beside floats, when parts are timed than in a model that has nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
OFF = 0.25  # by so much at most prices of a numeric are off

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


class Model(NamedTuple):
    """A whole model that was measured: ratios, and what of the predicted one is of parts in other
    numerics than the undiminished whole's."""

    predicted: float
    measured: float
    others: Mapping[str, float] = {}

    def point(self, factors: Mapping[str, float]) -> Point:
        """What is predicted with prices of numerics scaled, and what was measured."""
        beyond = sum((factors[n] - 1) * ratio for n, ratio in self.others.items() if n in factors)
        return max(self.predicted + beyond, (1 - OFF) * self.predicted), self.measured


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
    factors: Mapping[str, Ratio] = Field(default_factory=dict)  # numeric -> of prices of parts in
    # it, which predicted ratios are with, too
    errors: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = ()  # of left-out
    # points; none: of a table that did not keep them

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

        errors: Sequence[float] = self.errors
        if not errors:
            errors = _left_out_errors(_left_out([Model(*p) for p in self.points]), self.bend)
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
        """Where a line that goes below the origin turns towards it: the smallest point.

        Beyond the points such a line would promise ever more, and in the end negative latencies.
        """
        return min(p for p, _ in self.points) if self._line.at(0.0) < 0 else 0.0


def fit(models: Iterable[Model | Point], *, may_bend: bool = False) -> Correction:
    """Fit the line of least absolute relative deviations over the models and the dense model.

    The slope is held in [0.5, 2], the line within 8 % of (1, 1), and, where it has no bend, not
    below the origin: few models are small, and each of them may be off. Prices of each numeric but
    the whole's are scaled first, as models that have parts in it demand; that they need not be is
    worth as much as one model. Of 12 models or more a line that `may_bend` does so at one of them
    where that predicts left-out models much better; none is then predicted below half of its sum.

    Raises:
        ValueError: no models, or ratios that are not positive and finite.
    """
    cloud = [Model(*m) for m in models]
    ratios = [ratio for m in cloud for ratio in (m.predicted, m.measured)]
    if not cloud or not all(0 < ratio < float("inf") for ratio in ratios):
        raise ValueError(f"a correction needs positive, finite points, not {cloud}")
    left_out = _left_out(cloud)
    bend, errors = 0.0, _left_out_errors(left_out)
    if may_bend and len(cloud) >= BENT_POINTS:
        enough = BENT_ERROR * fmean(errors)
        for at in sorted(m.predicted for m in cloud)[BENT_ENDS:-BENT_ENDS]:
            bent = _left_out_errors(left_out, at)
            if fmean(bent) < enough:
                bend, errors, enough = at, bent, fmean(bent)
    factors = _factors(cloud)
    points = tuple(m.point(factors) for m in cloud)
    return Correction(
        **_least_absolute(points, bend)._asdict(),
        factors=factors,
        points=points,
        median_error=median(errors),
        worst_error=max(errors),
        errors=tuple(errors),
    )


def _left_out(cloud: Sequence[Model]) -> list[tuple[Point, list[Point]]]:
    """Each model and the others, with prices of numerics scaled as the others demand."""
    found = []
    for index, model in enumerate(cloud):
        rest = [*cloud[:index], *cloud[index + 1 :]]
        factors = _factors(rest)
        found.append((model.point(factors), [m.point(factors) for m in rest]))
    return found


def _left_out_errors(
    left_out: Sequence[tuple[Point, list[Point]]], bend: float = 0.0
) -> list[float]:
    lines = [_least_absolute(rest, bend) if rest else SAME for _, rest in left_out]
    return [_deviation(line, [p]) for line, (p, _) in zip(lines, left_out, strict=True)]


def _factors(cloud: Sequence[Model]) -> dict[str, float]:
    """What prices of each numeric are to be multiplied with, by a line for all of them."""
    numerics = sorted({numeric for model in cloud for numeric in model.others})
    if not numerics:
        return {}
    none = [0.0] * len(numerics)
    dense = [1.0, 1.0, *none]  # intercept, slope, beyond the slope of each numeric
    own = [[0.0, 0.0, *(float(n == numeric) for n in numerics)] for numeric in numerics]
    off = [
        [sign * x - OFF * (at == 1) for at, x in enumerate(row)] for row in own for sign in (1, -1)
    ]
    found = _least_deviations(
        [
            *((1.0, m.predicted, *(m.others.get(n, 0.0) for n in numerics)) for m in cloud),
            dense,
            *own,
        ],
        [*(m.measured for m in cloud), 1.0, *none],
        [*(1 / m.measured for m in cloud), 1.0, *(1.0 for _ in numerics)],
        [
            (dense, 1 + DENSE_TOLERANCE),
            ([-x for x in dense], DENSE_TOLERANCE - 1),
            ([-1.0, 0.0, *none], 0.0),
            *((row, 0.0) for row in off),
        ],
    )
    return {n: 1 + beyond / found[1] for n, beyond in zip(numerics, found[2:], strict=True)}


def _least_deviations(
    rows: Sequence[Sequence[float]],
    targets: Sequence[float],
    weights: Sequence[float],
    limits: Sequence[tuple[Sequence[float], float]],
) -> list[float]:
    """The coefficients, the second of them a slope, whose products with `rows` deviate least from
    `targets` and exceed no limit; a linear program, in which every deviation is what it is above
    less what it is below."""
    from scipy.optimize import linprog  # slow to import, and few callers need it

    count, unknown = len(rows), len(rows[0])
    unit = [[float(i == j) for j in range(count)] for i in range(count)]
    found = linprog(
        c=[*[0.0] * unknown, *weights, *weights],
        A_eq=[[*row, *(-x for x in one), *one] for row, one in zip(rows, unit, strict=True)],
        b_eq=targets,
        A_ub=[[*row, *[0.0] * (2 * count)] for row, _ in limits],
        b_ub=[most for _, most in limits],
        bounds=[
            (None, None),
            (MIN_SLOPE, MAX_SLOPE),
            *[(None, None)] * (unknown - 2),
            *[(0, None)] * (2 * count),
        ],
    )
    assert found.x is not None, found.message  # measured = predicted is always legal
    return [float(x) for x in found.x[:unknown]]


def _least_absolute(cloud: Sequence[Point], bend: float) -> Line:
    return _least_absolute_bent(cloud, bend) if bend else _least_absolute_line(cloud)


def _least_absolute_bent(cloud: Sequence[Point], bend: float) -> Line:
    def basis(predicted: float) -> list[float]:
        return [1.0, predicted, -max(bend - predicted, 0.0)]  # intercept, slope, steeper

    points = [*cloud, (1.0, 1.0)]
    smallest = min(p for p, _ in cloud)
    intercept, slope, steeper = _least_deviations(
        [basis(p) for p, _ in points],
        [m for _, m in points],
        [1 / m for _, m in points],
        [
            (basis(1.0), 1 + DENSE_TOLERANCE),
            ([-x for x in basis(1.0)], DENSE_TOLERANCE - 1),
            ([-x for x in basis(smallest)], -MIN_SHARE * smallest),
            ([0.0, 1.0, 1.0], MAX_SLOPE),
            ([0.0, -1.0, -1.0], -MIN_SLOPE),
        ],
    )
    return Line(intercept, min(max(slope, MIN_SLOPE), MAX_SLOPE), bend, steeper)


def _least_absolute_line(cloud: Sequence[Point]) -> Line:
    """In two variables the optimum is at a vertex: all of them are tried."""
    points = [*cloud, (1.0, 1.0)]
    pivots = [*points, (0.0, 0.0), (1.0, 1 - DENSE_TOLERANCE), (1.0, 1 + DENSE_TOLERANCE)]
    lines = [_through(a, b) for a, b in combinations(pivots, 2) if a[0] != b[0]]
    lines += [Line(m - slope * p, slope) for p, m in pivots for slope in (MIN_SLOPE, MAX_SLOPE)]
    legal = [line for line in lines if _is_legal(line)]
    return min([SAME, *legal], key=lambda line: (_deviation(line, points), abs(line.intercept)))


def _through(a: Point, b: Point) -> Line:
    slope = (b[1] - a[1]) / (b[0] - a[0])
    return Line(a[1] - slope * a[0], slope)


def _is_legal(line: Line) -> bool:
    return (
        MIN_SLOPE <= line.slope <= MAX_SLOPE
        and line.intercept >= -1e-12
        and abs(line.at(1.0) - 1) <= DENSE_TOLERANCE + 1e-12
    )


def _deviation(line: Line, points: Sequence[Point]) -> float:
    return sum(abs(line.at(p) - m) / m for p, m in points)
