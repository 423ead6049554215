"""Quantities of the command line: what is read, and what is said where nothing can be."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipc.cli.quantities import parse_latency, parse_seconds, parse_speedup
from zipc.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "factor"), [("2x", 2.0), ("2", 2.0), ("1.5X", 1.5), (" 3 x ", 3.0), ("2.50×", 2.5)]
)
def test_speedup_is_read(text: str, factor: float) -> None:
    assert parse_speedup(text) == factor


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        *[("2%", "2x"), ("two", "2x"), ("x2", "2x"), ("2,5x", "2.5x"), ("150%", "1.5x")],
        *[("3times", "3x"), ("", "2x"), ("nan", "2x"), ("-2x", "2x"), ("inf", "2x")],
    ],
)
def test_mistyped_speedup_is_answered_with_what_was_meant(text: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean {meant}\\?"):
        parse_speedup(text)


@pytest.mark.parametrize("text", ["1", "1x", "0.5x", "0"])
def test_speedup_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="above 1"):
        parse_speedup(text)


@given(st.floats(min_value=1.001, max_value=1000))
def test_speedup_reads_back_what_is_printed(factor: float) -> None:
    assert parse_speedup(f"{factor:.6f}x") == pytest.approx(factor, abs=1e-6)


@given(st.text())
def test_any_text_is_a_factor_above_one_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_speedup(text) > 1


@pytest.mark.parametrize(("text", "ms"), [("5ms", 5), ("5", 5), ("0.1s", 100), ("800us", 0.8)])
def test_latency_is_read_as_milliseconds(text: str, ms: float) -> None:
    assert parse_latency(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "0ms", "-3ms", "fast", "5 hours"])
def test_latency_that_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"e\.g\. 5ms"):
        parse_latency(text)


def test_seconds_are_read_in_their_units() -> None:
    assert [parse_seconds(t, "--max-time") for t in ("60s", "60", "2m", "500ms")] == [
        60,
        60,
        120,
        0.5,
    ]
