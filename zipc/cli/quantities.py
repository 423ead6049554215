"""Quantities as people write them: 2x, 5ms, 60s."""

from __future__ import annotations

import re

from zipc.core.errors import UsageError

_MS_PER = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_SECONDS_PER = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0}
MOST = 1_000_000
_WORDS = {"double": "2x", "twice": "2x", "two": "2x", "three": "3x", "triple": "3x", "four": "4x"}


def parse_speedup(text: str) -> float:
    """Read "2x", "2" or "1.5X" as a factor above 1."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*[xX×]?", text.strip())
    if found is None:
        raise UsageError(
            f"--speedup '{text}' is not a factor. Did you mean {_suggestion(text)}? "
            "Write how many times faster, e.g. 2x."
        )
    factor = float(found[1])
    if not 1 < factor < MOST:
        fault = "would not make the model faster" if factor <= 1 else "is out of reach"
        raise UsageError(
            f"--speedup {text} {fault}: it must be above 1 and below {MOST:,}, e.g. 2x."
        )
    return factor


def parse_latency(text: str, flag: str = "--latency") -> float:
    """Read "5ms", "5", "800us" or "0.1s" as milliseconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(us|µs|ms|s)?", text.strip().lower())
    value = float(found[1]) * _MS_PER[found[2] or "ms"] if found else 0.0
    if value <= 0:
        raise UsageError(f"{flag} '{text}' is not a time above 0. Write milliseconds, e.g. 5ms.")
    return value


def parse_seconds(text: str, flag: str) -> float:
    """Read "60s", "60", "500ms" or "2m" as seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|m|min)?", text.strip().lower())
    value = float(found[1]) * _SECONDS_PER[found[2] or "s"] if found else 0.0
    if value <= 0:
        raise UsageError(f"{flag} '{text}' is not a time above 0. Write seconds, e.g. 60s.")
    return value


def _suggestion(text: str) -> str:
    if text.strip().startswith("-"):
        return "2x"
    number = re.search(r"\d+(?:[.,]\d+)?", text)
    if number is None:
        return _WORDS.get(text.strip().lower(), "2x")
    factor = float(number[0].replace(",", "."))
    if "%" in text and factor > 10:
        factor = factor / 100 if factor > 100 else 1 + factor / 100
    return f"{factor:g}x" if factor > 1 else "2x"
