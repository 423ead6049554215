"""Text that comes from elsewhere and is printed."""

from __future__ import annotations

import re
from typing import Any

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # what a terminal would act on


def shown(value: Any, longest: int = 200) -> str:
    """What a stranger sent, safe to print on a terminal."""
    text = str(value)[: 2 * longest]
    return "".join(c if c.isprintable() else " " for c in text)[:longest].strip()
