"""What parts take in a whole model beyond what they take alone, as whole models tell.

A part that is timed alone finds its weights in the cache and hides what runs beside it in the
whole model; and a processor runs integers at another pace beside floats than by themselves. So the
latency of a whole model is linear in some terms, none of which is likely to be large: what no part
has, what each part takes more, a share of all parts of a numeric, and what each kind of part takes
more at some of its widths. Their coefficients are the most probable ones (Bayesian linear
regression) by whole models that were timed, of which any may be far off (errors of Student's t).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

FREEDOM = 4.0  # degrees, of errors
STEPS = 12  # of reweighting (Lange, Little and Taylor, 1989)

Terms = Mapping[str, float]


class Whole(NamedTuple):
    """A whole model that was timed."""

    alone_ms: float  # what its parts take alone, and what no part has
    ms: float  # what it takes
    noise: float  # of `ms`, relative: a standard deviation
    terms: Terms  # how often each is in it


def fit(wholes: Sequence[Whole], likely: Terms) -> dict[str, float]:
    """The coefficient of each term, of which `likely` has the standard deviations."""
    names = sorted(likely)
    often = np.array([[whole.terms.get(name, 0.0) for name in names] for whole in wholes])
    beyond = np.array([whole.ms - whole.alone_ms for whole in wholes])
    noise = np.array([whole.noise * whole.ms for whole in wholes]) ** 2
    spread = often * np.array([likely[name] for name in names]) ** 2
    weights = np.ones(len(wholes))
    for _ in range(STEPS):
        told = np.linalg.solve(spread @ often.T + np.diag(noise / weights), beyond)
        found = spread.T @ told
        off = (beyond - often @ found) ** 2 / noise
        weights = (FREEDOM + 1) / (FREEDOM + off)
    return dict(zip(names, found.tolist(), strict=True))


def beyond_ms(surplus: Terms, terms: Terms) -> float:
    """What a part or a model takes beyond what it takes alone."""
    return sum(surplus.get(name, 0.0) * often for name, often in terms.items())
