"""Ranges that an activation tensor may be rounded in; which is best, its readers' outputs tell.

Nothing clips less than the range from least to largest. Percentiles drop a share of the values at
each end. Entropy clips magnitudes where the histogram that rounding leaves diverges least from the
exact one (Migacz, 8-bit Inference with TensorRT, 2017). Among shrunk ranges is that of least
squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

Range = tuple[float, float]  # low <= 0 <= high
SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of both ends
PERCENTILES = (99.99, 99.9)
BINS, STEPS = 2048, 255


def candidate_ranges(x: Tensor) -> dict[str, Range]:
    """Ranges of a sample of values, by the way they were found; "minmax" is always the first."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    found = {
        "minmax" if share == 1 else f"shrunk to {share}": (low * share, high * share)
        for share in SHRINK
    }
    if low == high:
        return {"minmax": (low, high)}
    counts = torch.histc(x.float(), BINS, low, high).double()
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    below = counts.cumsum(0) / counts.sum()
    for percentile in PERCENTILES:
        tail = 1 - percentile / 100
        least = edges[int((below < tail).sum())]  # the bin that holds it lies within
        largest = edges[1 + int((below < 1 - tail).sum())]
        found[f"percentile {percentile}"] = (min(float(least), 0.0), max(float(largest), 0.0))
    magnitude = max(-low, high)
    clipped = [(max(low, -s * magnitude), min(high, s * magnitude)) for s in SHRINK]
    found["entropy"] = min(clipped, key=lambda within: _divergence(counts, edges, within))
    return found


def _divergence(counts: Tensor, edges: Tensor, within: Range) -> float:
    """Kullback-Leibler divergence of the rounded histogram from the exact, clipped one."""
    middles = (edges[1:] + edges[:-1]) / 2
    low, high = within
    step = (high - low) / STEPS
    inside = (middles >= low) & (middles <= high)
    kept = counts[inside]
    exact = kept.clone()  # what is clipped lies at the ends
    exact[0] += counts[middles < low].sum()
    exact[-1] += counts[middles > high].sum()
    level = ((middles[inside] - low) / step).round().long()
    whole = torch.zeros(STEPS + 1, dtype=torch.float64)
    bins = whole.scatter_add(0, level, (kept > 0).double())
    mean = whole.scatter_add(0, level, kept) / bins.clamp_min(1)
    rounded = torch.where(kept > 0, mean[level], torch.zeros_like(kept))
    p, q = exact / exact.sum(), rounded / rounded.sum().clamp_min(1)
    some = p > 0
    return float((p[some] * (p[some] / q[some].clamp_min(1e-9)).log()).sum())
