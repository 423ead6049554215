"""The metrics against scipy and counting by hand; the bootstrap against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import pearsonr, spearmanr

from zipc.core.errors import UsageError
from zipc.metrics import (
    METRICS,
    accuracy,
    choose_metric,
    f1,
    lower_is_better,
    mcc,
    metric_value,
    paired_bootstrap,
    pearson,
    spearman,
)


def per_row(prediction: object, target: object) -> np.ndarray:
    return np.stack([np.asarray(prediction, float), np.asarray(target, float)], axis=1)


@settings(deadline=None, max_examples=60)
@given(st.integers(3, 40), st.integers(0, 2**31))
def test_correlations_equal_scipy_with_ties(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, n).astype(float), rng.integers(0, 6, n) + 0.5
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(x, y) == 0
        assert pearson(x, y) == 0
        return
    assert spearman(x, y) == pytest.approx(100 * spearmanr(x, y).statistic, abs=1e-9)
    assert pearson(x, y) == pytest.approx(100 * pearsonr(x, y).statistic, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(2, 4), st.integers(0, 2**31))
def test_class_metrics_equal_counting(n: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, true = rng.integers(0, classes, n), rng.integers(0, classes, n)
    assert accuracy(predicted, true) == pytest.approx(
        100 * sum(p == t for p, t in zip(predicted, true, strict=True)) / n
    )
    one_hot_p, one_hot_t = np.eye(classes)[predicted], np.eye(classes)[true]
    flat_p, flat_t = one_hot_p - one_hot_p.mean(0), one_hot_t - one_hot_t.mean(0)
    scale = np.sqrt((flat_p**2).sum() * (flat_t**2).sum())
    expected = (flat_p * flat_t).sum() / scale if scale > 1e-12 else 0.0
    assert mcc(predicted, true) == pytest.approx(100 * expected, abs=1e-9)


def test_f1_of_two_classes_is_that_of_class_one() -> None:
    predicted, true = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    precision, recall = 2 / 3, 2 / 3
    expected = 100 * 2 * precision * recall / (precision + recall)
    assert f1(predicted, true) == pytest.approx(expected)


def test_f1_of_three_classes_is_the_mean_over_classes() -> None:
    predicted, true = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2])
    assert f1(predicted, true) == pytest.approx(100 * (1 + 2 / 3 + 2 / 3) / 3)


def test_constant_predictions_score_zero_and_not_nan() -> None:
    constant, target = np.full(7, 0.1), np.arange(7.0)
    assert spearman(constant, target) == 0
    assert pearson(constant, target) == 0
    assert mcc(np.zeros(7), np.zeros(7)) == 0


@pytest.mark.parametrize("name", sorted(METRICS))
@settings(deadline=None, max_examples=20)
@given(values=arrays(np.int64, (4, 12, 2), elements=st.integers(0, 2)))
def test_metrics_of_many_samples_at_once_equal_one_by_one(name: str, values: np.ndarray) -> None:
    if name == "f1":
        values[:, 0] = [[2, 2]]  # every sample has the third class, as every sample of a test set
    together = METRICS[name](values[..., 0].astype(float), values[..., 1].astype(float))
    one_by_one = [metric_value(name, sample.astype(float)) for sample in values]
    np.testing.assert_allclose(together, one_by_one, atol=1e-9)


def test_loss_is_the_mean_over_tokens_and_perplexity_its_exponential() -> None:
    totals, tokens = np.array([6.0, 0.5]), np.array([4.0, 1.0])
    assert metric_value("loss", per_row(totals, tokens)) == pytest.approx(1.3)
    assert metric_value("perplexity", per_row(totals, tokens)) == pytest.approx(np.exp(1.3))
    assert {name for name in METRICS if lower_is_better(name)} == {"loss", "perplexity"}


def test_places_count_alike_however_many_a_row_has() -> None:
    hits, places = np.array([1.0, 9.0]), np.array([1.0, 10.0])
    assert metric_value("pixel_accuracy", per_row(hits, places)) == pytest.approx(100 * 10 / 11)


def test_the_first_metric_that_fits_is_chosen_and_a_wrong_one_gets_a_hint() -> None:
    assert choose_metric(None, ["loss", "perplexity"], what="a model") == "loss"
    assert choose_metric("perplexity", ["loss", "perplexity"], what="a model") == "perplexity"
    with pytest.raises(UsageError, match=r"\(a model\).*fit: loss. Did you mean 'perplexity'"):
        choose_metric("perplexty", ["loss"], what="a model")


def test_bootstrap_of_a_mean_matches_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    dense, noise = rng.random(2000), rng.normal(0.01, 0.05, 2000)
    interval = paired_bootstrap(
        per_row(dense, dense), per_row(dense + noise, dense), metric="agreement", n=2000, seed=1
    )
    half = 1.96 * noise.std() / np.sqrt(2000)
    assert interval == pytest.approx(
        (100 * (noise.mean() - half), 100 * (noise.mean() + half)), abs=0.02
    )


def test_bootstrap_covers_the_difference_and_is_repeatable() -> None:
    rng = np.random.default_rng(0)
    target = rng.random(300)
    dense = per_row(target + rng.normal(0, 0.1, 300), target)
    worse = per_row(dense[:, 0] + rng.normal(0, 0.2, 300), target)
    low, high = paired_bootstrap(dense, worse, metric="spearman", seed=3) or (0, 0)
    difference = metric_value("spearman", worse) - metric_value("spearman", dense)
    assert low < difference < high < 0
    assert paired_bootstrap(dense, worse, metric="spearman", seed=3) == (low, high)
    assert paired_bootstrap(dense, dense, metric="spearman") == (0, 0)


def test_bootstrap_gives_no_interval_for_a_user_function() -> None:
    empty = np.empty((0, 2))
    assert paired_bootstrap(empty, empty, metric="mine.py:score") is None


def test_bootstrap_refuses_results_of_different_rows() -> None:
    with pytest.raises(ValueError, match="rows differ"):
        paired_bootstrap(np.ones((3, 2)), np.ones((4, 2)), metric="accuracy")
