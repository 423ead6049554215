from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from zipc.latency_tables.surplus import Whole, beyond_ms, fit

LIKELY = {"fixed": 2.0, "each": 0.2, "all int8-static": 0.1}
TRUTH = {"fixed": 1.5, "each": -0.1, "all int8-static": 0.12}


def drawn(rng: random.Random, truth: Mapping[str, float], scatter: float = 0.0) -> Whole:
    """A model of twelve parts, some of which are gone and some in integers."""
    there, integers = rng.randint(3, 12), rng.uniform(0, 8)
    terms = {"fixed": 1.0, "each": float(there), "all int8-static": integers}
    alone_ms = there + integers
    return Whole(
        alone_ms, (alone_ms + beyond_ms(truth, terms)) * rng.gauss(1, scatter), 0.01, terms
    )


def test_terms_are_told_by_models_that_have_much_and_little_of_them() -> None:
    rng = random.Random(0)
    found = fit([drawn(rng, TRUTH) for _ in range(12)], LIKELY)
    for name, value in TRUTH.items():
        assert found[name] == pytest.approx(value, rel=0.1)


def test_models_nobody_timed_are_predicted_from_noisy_ones() -> None:
    rng = random.Random(0)
    found = fit([drawn(rng, TRUTH, 0.01) for _ in range(18)], LIKELY)
    for _ in range(20):
        whole = drawn(rng, TRUTH)
        assert whole.alone_ms + beyond_ms(found, whole.terms) == pytest.approx(whole.ms, rel=0.02)


@pytest.mark.parametrize("times", [0.6, 1.5])
def test_one_wild_model_moves_nothing(times: float) -> None:
    rng = random.Random(0)
    wholes = [drawn(rng, TRUTH, 0.01) for _ in range(12)]
    wild = wholes[3]._replace(ms=wholes[3].ms * times)
    with_it, without = (fit([*wholes[:3], *more, *wholes[4:]], LIKELY) for more in ([wild], []))
    for whole in wholes:
        beyond = beyond_ms(with_it, whole.terms) - beyond_ms(without, whole.terms)
        assert abs(beyond) < 0.01 * whole.ms


def test_without_models_that_say_so_nothing_is_taken_beyond() -> None:
    rng = random.Random(0)
    assert fit([drawn(rng, {}) for _ in range(6)], LIKELY) == pytest.approx(
        dict.fromkeys(LIKELY, 0.0), abs=1e-9
    )
    no_integers = [drawn(rng, {"each": 0.1}) for _ in range(6)]
    no_integers = [w._replace(terms=w.terms | {"all int8-static": 0.0}) for w in no_integers]
    assert fit(no_integers, LIKELY)["all int8-static"] == 0.0


def test_what_is_unlikely_is_not_believed_of_one_model() -> None:
    whole = drawn(random.Random(0), {})
    found = fit([whole._replace(ms=2 * whole.ms)], LIKELY)
    assert abs(found["all int8-static"]) < 2 * LIKELY["all int8-static"]
