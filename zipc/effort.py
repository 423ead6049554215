"""How much work each `--effort` buys."""

from __future__ import annotations

from dataclasses import dataclass

from zipc.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Effort:
    calibration_texts: int
    repair_texts: int  # of them, seen again by the repair of the chosen allocation
    search_texts: int  # scored for every candidate
    confirm_texts: int  # scored for the finalists
    trials: int
    search_seconds: float
    rounds: int  # of the closed loop
    verdict_pairs: int  # at most


EFFORTS: dict[str, Effort] = {
    "quick": Effort(512, 256, 48, 128, 40, 6.0, 2, 100),
    "default": Effort(4096, 3072, 256, 1024, 600, 38.0, 5, 400),
    "extensive": Effort(8192, 8192, 512, 2048, 4000, 900.0, 6, 400),
}


def effort_of(name: str) -> Effort:
    if name not in EFFORTS:
        raise UsageError(f"Unknown effort '{name}'. Choose one of: {', '.join(EFFORTS)}.")
    return EFFORTS[name]
