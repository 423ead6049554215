"""The checker counts what a plain loop counts; eligibility is by channels and by numeric."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from zipc.core.errors import UsageError
from zipc.numerics.pattern import conforms, obstacle, parse_pattern


def by_loop(values: np.ndarray, axis: int, kept: int, of: int) -> bool:
    lines = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    return all(
        sum(v != 0 for v in line[i : i + of]) <= kept
        for line in lines
        for i in range(0, len(line), of)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_arrays_conform_as_a_plain_loop_says(dtype: type, pattern: str) -> None:
    rng = np.random.default_rng(0)
    kept, of = parse_pattern(pattern)
    seen = set()
    for density, axis in itertools.product((0.2, 0.4), (0, 1, 2)):
        shape = [2, 2, 2]
        shape[axis] = 8
        for _ in range(20):
            values = rng.integers(1, 9, shape) * (rng.random(shape) < density)
            want = by_loop(values, axis, kept, of)
            assert conforms(values.astype(dtype), axis=axis, pattern=pattern) == want
            seen.add(want)
    assert seen == {True, False}


def test_negative_zero_is_a_zero_and_nan_is_not() -> None:
    assert conforms(np.array([[-0.0, 1, 0, 2]]), axis=1)
    assert not conforms(np.array([[np.nan, 1, 0, 2]]), axis=1)


def test_channels_that_make_no_whole_groups_do_not_conform() -> None:
    assert not conforms(np.zeros((4, 6)), axis=1)


def test_flattened_groups_of_a_convolution_are_not_the_pattern() -> None:
    flat = np.zeros((1, 8, 2, 2), dtype=np.float32)
    flat.reshape(1, -1, 4)[..., :2] = 1.0  # 2 of 4 along C x R x S
    assert not conforms(flat, axis=1)


@pytest.mark.parametrize(
    ("outputs", "channels", "integer", "reason"),
    [
        (384, 1536, False, None),
        (8, 16, False, None),
        (10, 64, False, "10 output channels are no multiple of 8"),
        (64, 3, False, "3 input channels are no multiple of 16"),
        (64, 0, False, "0 input channels are no multiple of 16"),
        (8, 16, True, "16 input channels are no multiple of 32"),
        (32, 32, True, None),
    ],
)
def test_weights_too_small_or_uneven_are_not_eligible(
    outputs: int, channels: int, integer: bool, reason: str | None
) -> None:
    assert obstacle(outputs, channels, integer=integer) == reason


@pytest.mark.parametrize("text", ["", "2", "2:", "4:4", "0:4", "2:4:8", "two:four"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no sparsity pattern"):
        parse_pattern(text)
