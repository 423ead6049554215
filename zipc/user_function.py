"""`--eval file.py:function`: the user's own figure of quality, f(predict, rows) -> float.

Of a text table, `rows` are its rows and `predict` takes texts and gives embeddings or logits. Of
any other data, `rows` are arrays by name (the model's inputs and `labels`), and `predict` takes
such arrays and gives the outputs by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zipc.core.errors import UsageError
from zipc.user_code import FAILURES, load_function, told

UserFunction = Callable[[Any, Any], float]  # predict, rows


def load_user_function(source: str) -> UserFunction:
    """Load `file.py:function`, because the user named that file; nothing else is ever imported.

    Raises:
        UsageError: see `load_function`.
    """
    return load_function(source, arguments=2, flag="--eval")[0]


def call_user_function(
    function: UserFunction, predict: Callable[..., Any], rows: Any, *, source: str
) -> float:
    """Call the user's function and check that it gives a finite number.

    Raises:
        UsageError: it raised, or gave something else; the message names file, function and line.
    """
    try:
        value = function(predict, rows)
    except UsageError:  # from our own predict
        raise
    except FAILURES as error:
        path = Path(source.rpartition(":")[0])
        raise UsageError(f"--eval {source} raised {told(error, path)}") from error
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--eval {source} gave {value!r}, not a number.") from error
    if not math.isfinite(number):
        raise UsageError(f"--eval {source} gave {number}, not a finite number.")
    return number
