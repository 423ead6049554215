"""Code of the user's own: imported because the user named it, never because a file of ours does."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from zipc.core.errors import UsageError

LAST_FRAMES = 3
SHOWN = 5  # names in a message
FAILURES = (Exception, SystemExit)  # whatever code of the user's may raise


def split_reference(source: str) -> tuple[Path, str] | None:
    """File and function of `path/to/file.py:function`, or None where it is not of that form."""
    file, _, name = source.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        return None
    return Path(file).expanduser(), name


def load_function(
    source: str, *, arguments: int = 0, flag: str = ""
) -> tuple[Callable[..., Any], ModuleType]:
    """The function that `path/to/file.py:function` names, and its module.

    While the file is imported, its folder can be imported from, as if it were run as a script.
    For messages, `arguments` is how many it will be called with, `flag` where the user named it.

    Raises:
        UsageError: no such file or function, importing the file fails, or the function does not
            take as many arguments.
    """
    where = f"{flag} {source}".strip()
    reference = split_reference(source)
    if reference is None:
        raise UsageError(f"{where}: give it as path/to/file.py:function.")
    path, name = reference
    if not path.is_file():
        raise UsageError(f"{where}: there is no file {path}. Check the path before the colon.")
    alias = f"user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(alias, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{where}: {path.name} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module  # dataclasses look their module up there
    try:
        with importable(path.parent):
            spec.loader.exec_module(module)
    except FAILURES as error:
        del sys.modules[alias]
        raise UsageError(f"{where}: importing it raised {told(error, path)}") from error
    function = getattr(module, name, None)
    if function is not None and not callable(function):
        kind = type(function).__name__
        raise UsageError(f"{where}: {name} in {path.name} is of type {kind}, not a function.")
    if function is None:
        names = _functions(module, arguments)
        close = difflib.get_close_matches(name, names, n=1)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        found = f" It has: {', '.join(names[:SHOWN])}{more}." if names else ""
        hint = f" Did you mean '{close[0]}'?" if close else found
        raise UsageError(f"{where}: {path.name} has no function '{name}'.{hint}")
    if arguments and not _takes(function, arguments):
        raise UsageError(f"{where}: {name} is called with {arguments} arguments, and takes others.")
    return function, module


def _functions(module: ModuleType, arguments: int) -> list[str]:
    """Public functions of the file that take so many arguments; without any, all that it can call.

    What it imports is not its own.
    """
    own = {
        name: value
        for name, value in vars(module).items()
        if callable(value)
        and name[0] != "_"
        and getattr(value, "__module__", "") == module.__name__
    }
    fitting = [
        name
        for name, value in own.items()
        if inspect.isfunction(value) and _takes(value, arguments)
    ]
    return fitting or list(own)


def _takes(function: Callable[..., Any], arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    return True


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let code import what lies in `folder`."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def told(error: BaseException, path: Path) -> str:
    """An error in words, and the last lines of the user's own code that led to it."""
    folder = path.expanduser().resolve().parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve().is_relative_to(folder)
        and "site-packages" not in Path(frame.filename).parts
    ]
    lines = [
        f"\n  {Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: {frame.line}"
        for frame in frames[-LAST_FRAMES:]
    ]
    text = str(error).strip()
    return f"{type(error).__name__}{': ' if text else ''}{text}{''.join(lines)}"
