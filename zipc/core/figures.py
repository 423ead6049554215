"""How figures are written for people."""

from __future__ import annotations

import math


def three_digits(value: float) -> str:
    """At least three significant digits and no exponent, so that small times stay apart."""
    if value <= 0:
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
