"""`--eval file.py:function`: the user's own figure of quality, f(predict, rows) -> float.

Of a text table, `rows` are its rows and `predict` takes texts and gives embeddings or logits. Of
any other data, `rows` are arrays by name (the model's inputs and `labels`), and `predict` takes
such arrays and gives the outputs by name.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zipc.core.errors import UsageError

UserFunction = Callable[[Any, Any], float]  # predict, rows


def load_user_function(source: str) -> UserFunction:
    """Load `file.py:function`, because the user named that file; nothing else is ever imported.

    Raises:
        UsageError: no such file or function, or importing the file fails.
    """
    file, _, name = source.rpartition(":")
    if not file or not name.isidentifier():
        raise UsageError(f"--eval {source}: give it as path/to/file.py:function.")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"--eval {source}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location("zipc_user_evaluation", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--eval {source}: {path.name} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--eval {source}: importing it raised {_told(error, path)}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UsageError(f"--eval {source}: {path.name} has no function '{name}'.{hint}")
    return function  # type: ignore[no-any-return]


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
    except (Exception, SystemExit) as error:
        path = Path(source.rpartition(":")[0])
        raise UsageError(f"--eval {source} raised {_told(error, path)}.") from error
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--eval {source} gave {value!r}, not a number.") from error
    if not math.isfinite(number):
        raise UsageError(f"--eval {source} gave {number}, not a finite number.")
    return number


def _told(error: BaseException, path: Path) -> str:
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == path.name]
    return f"{text} (line {lines[-1]})" if lines else text
