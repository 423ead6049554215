"""Quality metrics over (prediction, target) columns, and the paired bootstrap of a difference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Array = npt.NDArray[np.float64]


def metric_value(metric: str, per_row: Array) -> float:
    """Compute a named metric x100 from `per_row` (n, 2): prediction and target of each row."""
    return float(METRICS[metric](per_row[:, 0], per_row[:, 1]))


def paired_bootstrap(
    per_row_dense: Array, per_row_compiled: Array, *, metric: str, n: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of compiled - dense, resampling rows of both together.

    None when the metric is a user's function: it gives one figure and no rows to resample.
    """
    if metric not in METRICS:
        return None
    if per_row_dense.shape != per_row_compiled.shape:
        raise ValueError(f"rows differ: {per_row_dense.shape} and {per_row_compiled.shape}")
    rows = len(per_row_dense)
    rng = np.random.default_rng(seed)
    compute = METRICS[metric]
    differences = []
    chunk = max(1, 2_000_000 // rows)
    for start in range(0, n, chunk):
        pick = rng.integers(0, rows, size=(min(chunk, n - start), rows))
        dense, compiled = per_row_dense[pick], per_row_compiled[pick]
        differences.append(
            compute(compiled[..., 0], compiled[..., 1]) - compute(dense[..., 0], dense[..., 1])
        )
    low, high = np.quantile(np.concatenate(differences), [0.025, 0.975])
    return float(low), float(high)


def pearson(prediction: Array, target: Array) -> Array:
    """Pearson correlation x100 along the last axis; a constant side correlates with nothing: 0."""
    x = prediction - prediction.mean(axis=-1, keepdims=True)
    y = target - target.mean(axis=-1, keepdims=True)
    energy_x, energy_y = (x * x).sum(axis=-1), (y * y).sum(axis=-1)
    floor_x = 1e-24 * (prediction * prediction).sum(axis=-1)  # rounding of a constant column
    floor_y = 1e-24 * (target * target).sum(axis=-1)
    constant = (energy_x <= floor_x) | (energy_y <= floor_y)
    scale = np.sqrt(np.where(constant, 1.0, energy_x) * np.where(constant, 1.0, energy_y))
    return np.asarray(100 * np.where(constant, 0.0, (x * y).sum(axis=-1) / scale))


def spearman(prediction: Array, target: Array) -> Array:
    """Spearman rank correlation x100 along the last axis; ties share their mean rank."""
    return pearson(rankdata(prediction, axis=-1), rankdata(target, axis=-1))


def accuracy(prediction: Array, target: Array) -> Array:
    """Share of equal classes x100 along the last axis."""
    return np.asarray(100 * (prediction == target).mean(axis=-1))


def f1(prediction: Array, target: Array) -> Array:
    """F1 x100 of class 1 when there are two classes (0 and 1), else the mean over classes."""
    classes = np.union1d(prediction, target)
    if set(classes.tolist()) <= {0.0, 1.0}:
        classes = np.array([1.0])
    total = np.zeros(prediction.shape[:-1])
    present = np.zeros(prediction.shape[:-1])
    for cls in classes:
        predicted, true = prediction == cls, target == cls
        support = predicted.sum(axis=-1) + true.sum(axis=-1)
        hits = (predicted & true).sum(axis=-1)
        total += np.where(support > 0, 2 * hits / np.maximum(support, 1), 0.0)
        present += support > 0
    return np.asarray(100 * total / np.maximum(present, 1))


def mcc(prediction: Array, target: Array) -> Array:
    """Matthews correlation x100, for any number of classes (Gorodkin 2004); 0 when undefined."""
    rows = float(prediction.shape[-1])
    correct = (prediction == target).sum(axis=-1) * 1.0
    cross = np.zeros_like(correct)
    squared_predicted = np.zeros_like(correct)
    squared_true = np.zeros_like(correct)
    for cls in np.union1d(prediction, target):
        predicted = (prediction == cls).sum(axis=-1) * 1.0
        true = (target == cls).sum(axis=-1) * 1.0
        cross += predicted * true
        squared_predicted += predicted**2
        squared_true += true**2
    scale = np.sqrt((rows**2 - squared_predicted) * (rows**2 - squared_true))
    return np.asarray(
        100 * np.where(scale > 0, (correct * rows - cross) / np.where(scale > 0, scale, 1.0), 0.0)
    )


def agreement(prediction: Array, target: Array) -> Array:
    """Mean x100 of the agreement with the dense model, one figure a row; the target is unused."""
    return np.asarray(100 * prediction.mean(axis=-1))


METRICS: dict[str, Callable[[Array, Array], Array]] = {
    "spearman": spearman,
    "pearson": pearson,
    "accuracy": accuracy,
    "f1": f1,
    "mcc": mcc,
    "agreement": agreement,
}
