"""Whole-model correction: what a sum of prices gets wrong about the latency of a whole graph.

Latency adds over parts only roughly. What parts take beyond what they take alone is fitted on whole
models (`surplus`) and read on models left out of that fit. Where parts are timed with cold caches,
small models, whose weights a cache holds, are another matter: measured may be less than predicted
below a bend.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean, median
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MIN_SLOPE, MAX_SLOPE = 0.5, 2.0  # below a bend
UNSEEN = 0.015  # by so much, relative, a machine differs from itself minutes later
BENT_POINTS, BENT_ENDS = 12, 3  # how many show a bend, and how many of them on either side of it
BENT_ERROR = 0.8  # of what no bend leaves of the mean error of left-out points
MIN_SHARE = 0.5  # of the smallest predicted ratio: what a bend must leave of it

Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Point = tuple[float, float]  # (predicted ratio, measured ratio)


class Correction(BaseModel):
    """measured ratio ≈ predicted ratio, steeper below a bend; both to the undiminished graph.

    Predicted is with the surplus. Errors are relative and read on points left out of the fit, one
    at a time: an honest estimate of what the next allocation will see.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    surplus: Mapping[str, Finite] = Field(default_factory=dict)  # term -> ms, or a share
    bend: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    steeper: float = Field(default=0.0, ge=MIN_SLOPE - 1, le=MAX_SLOPE - 1)
    points: tuple[tuple[Ratio, Ratio], ...] = Field(min_length=1)
    errors: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(min_length=1)

    @property
    def n(self) -> int:
        return len(self.points)

    @property
    def median_error(self) -> float:
        return median(self.errors)

    @property
    def worst_error(self) -> float:
        return max(self.errors)

    @property
    def reach(self) -> float:
        """Half of the 95 % interval of the logarithm of a predicted ratio.

        By Student's t over the left-out errors, as wide as so few points demand, and what they
        cannot show, since they are timed at one time.
        """
        from scipy.special import stdtrit  # slow to import, and few callers need it

        squares = fmean(math.log1p(error) ** 2 for error in self.errors)
        return float(stdtrit(self.n, 0.975)) * math.sqrt(squares + UNSEEN**2)

    def apply(self, ratio: float) -> float:
        """Predict the measured ratio. Monotone, and positive for every positive `ratio`.

        Beyond the points a line below a bend would promise ever more, and in the end negative
        latencies: at the smallest of them it turns towards the origin.
        """
        knee = self._knee
        if ratio >= knee:
            return _at(ratio, self.bend, self.steeper)
        return ratio * _at(knee, self.bend, self.steeper) / knee

    def invert(self, ratio: float) -> float:
        """Predicted ratio at which the measured one is `ratio`."""
        knee = self._knee
        lowest = _at(knee, self.bend, self.steeper)
        if ratio >= self.bend:
            return ratio
        if ratio >= lowest:
            return (ratio + self.steeper * self.bend) / (1 + self.steeper)
        return ratio * knee / lowest

    @property
    def _knee(self) -> float:
        return min(p for p, _ in self.points) if self.steeper > 0 else 0.0


def fit(
    points: Sequence[Point],
    left_out: Sequence[tuple[Point, Sequence[Point]]],
    *,
    surplus: Mapping[str, float],
    may_bend: bool = False,
) -> Correction:
    """The correction that `points` demand, with what they show where each of them is left out.

    `left_out` has each point and the others, as predicted without its measurement. Of 12 points or
    more a line that `may_bend` does so at one of them where that predicts left-out points much
    better; none is then predicted below half of what it was.

    Raises:
        ValueError: no points, or ratios that are not positive and finite.
    """
    if not points or not all(0 < ratio < math.inf for point in points for ratio in point):
        raise ValueError(f"a correction needs positive, finite points, not {points}")
    bend, errors = 0.0, _errors(left_out, 0.0)
    if may_bend and len(points) >= BENT_POINTS:
        enough = BENT_ERROR * fmean(errors)
        for at in sorted(p for p, _ in points)[BENT_ENDS:-BENT_ENDS]:
            bent = _errors(left_out, at)
            if fmean(bent) < enough:
                bend, errors, enough = at, bent, fmean(bent)
    return Correction(
        surplus=surplus,
        bend=bend,
        steeper=_steeper(points, bend),
        points=tuple(points),
        errors=tuple(errors),
    )


def _errors(left_out: Sequence[tuple[Point, Sequence[Point]]], bend: float) -> list[float]:
    return [abs(_at(p, bend, _steeper(rest, bend)) - m) / m for (p, m), rest in left_out]


def _steeper(points: Sequence[Point], bend: float) -> float:
    """By how much a line is steeper below a bend that deviates least, relative and absolute.

    Every point below the bend would have one of its own: the weighted median of these.
    """
    below = sorted(((p - m) / (bend - p), (bend - p) / m) for p, m in points if p < bend)
    if not below:
        return 0.0
    passed = list(accumulate(weight for _, weight in below))
    found, _ = below[bisect_left(passed, passed[-1] / 2)]
    smallest = min(p for p, _ in points)
    most = min(MAX_SLOPE - 1, (1 - MIN_SHARE) * smallest / (bend - smallest))
    return min(max(found, MIN_SLOPE - 1), most)


def _at(predicted: float, bend: float, steeper: float) -> float:
    return predicted - steeper * max(bend - predicted, 0.0)
