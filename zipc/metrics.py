"""Quality metrics over (prediction, target) columns, and the paired bootstrap of a difference."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from zipc.core.errors import UsageError

Array = npt.NDArray[np.float64]


def _nothing() -> npt.NDArray[Any]:
    return np.empty((0, 0))


@dataclass(frozen=True, slots=True)
class EvalResult:
    """A quality figure with what is needed to compare it: see `paired_bootstrap`."""

    value: float  # x100 but for losses; a user's function's figure is kept as it is
    per_row: Array  # (n, 2) prediction and target; (0, 2) for a user's function
    n: int
    outputs: npt.NDArray[Any] = field(default_factory=_nothing)  # what `agreement` is read from


def metric_value(metric: str, per_row: Array) -> float:
    """Compute a named metric from `per_row` (n, 2): prediction and target of each row."""
    return float(METRICS[metric](per_row[:, 0], per_row[:, 1]))


def lower_is_better(metric: str) -> bool:
    """Whether a smaller figure is a better model; a user's own metric is taken to grow."""
    return metric in LOWER_IS_BETTER


def check_metric(name: str | None) -> None:
    """Refuse the name of no metric, before a model is loaded that it may fit.

    Raises:
        UsageError: there is no such metric.
    """
    if name is not None and name not in METRICS:
        raise UsageError(
            f"--metric {name} is not known.{_meant(name)} Choose from: {', '.join(METRICS)}; or "
            "bring your own with --eval FILE.py:FUNCTION."
        )


def choose_metric(wanted: str | None, fitting: Sequence[str], *, what: str) -> str:
    """Return the wanted metric, or the first that fits.

    Raises:
        UsageError: the wanted one does not fit; `what` describes model and data.
    """
    chosen = wanted or fitting[0]
    if chosen not in fitting:
        raise UsageError(
            f"The metric '{chosen}' does not fit this model and data ({what}). "
            f"Metrics that fit: {', '.join(fitting)}.{_meant(chosen)}"
        )
    return chosen


def _meant(name: str) -> str:
    """The known metric that another name is close to, as a question."""
    close = difflib.get_close_matches(name, METRICS, n=1)
    return f" Did you mean '{close[0]}'?" if close and close[0] != name else ""


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


def share(hits: Array, count: Array) -> Array:
    """Hits x100 of all that was counted, where a row holds many: pixels, tokens."""
    return np.asarray(100 * hits.sum(axis=-1) / np.maximum(count.sum(axis=-1), 1))


def loss(total: Array, count: Array) -> Array:
    """Mean loss in nats, from each row's sum and its number of tokens."""
    return np.asarray(total.sum(axis=-1) / np.maximum(count.sum(axis=-1), 1))


def perplexity(total: Array, count: Array) -> Array:
    """Exponential of the mean loss."""
    return np.exp(loss(total, count))


METRICS: dict[str, Callable[[Array, Array], Array]] = {
    "spearman": spearman,
    "pearson": pearson,
    "accuracy": accuracy,
    "f1": f1,
    "mcc": mcc,
    "agreement": agreement,
    "pixel_accuracy": share,
    "token_accuracy": share,
    "loss": loss,
    "perplexity": perplexity,
}
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
