"""Latency tables whose prices a test chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipc.core.types import Level, Workload
from zipc.latency_tables.table import Entry, LatencyTable
from zipc.prices import Addition, Prices, SitePrices


def made(
    prices: Mapping[tuple[int, str], float], *, spread: float = 0.0, **changes: Any
) -> LatencyTable:
    """Milliseconds by width and numeric, of a site beside an anchor of 2 ms; fields may change.

    The three samples of an entry lie `spread` apart, relative to its price.
    """
    entries = [
        Entry(
            signature="ffn-8",
            level=Level(width, numeric),
            samples_ms=(ms * (1 - spread), ms, ms * (1 + spread)),
            anchor_ms=(2.0, 2.0, 2.0),
        )
        for (width, numeric), ms in prices.items()
    ]
    fields = {
        "target": "cpu",
        "runtime": "onnxruntime",
        "workload": Workload(1, 16, 1),
        "fingerprint": {"cpu": "one"},
        "anchor": "a",
    }
    return LatencyTable(**(fields | changes)).with_entries(entries)


@dataclass(frozen=True)
class Chosen(SitePrices):
    """One site, whose levels take what a function says."""

    ms: Callable[[Level], float] = lambda _: 1.0

    def alone_ms(self, site: str, level: Level) -> float:
        return self.ms(level)

    def near(self, site: str, level: Level) -> dict[str, float]:
        return {}


def prices_by(ms: Callable[[Level], float]) -> Prices:
    """Prices of a model of one site, whose levels take what `ms` says."""
    table = made({(8, "fp32"): 1.0})
    sites = Chosen(table, {"site": "ffn-8"}, {"site": Level(8)}, "fp32", ms=ms)
    return Prices(
        *(table, Path("table"), sites, {"site": 1}, 1.0, 1.0),
        add=Addition(1.0, {}, 0.0),
        seconds=0.0,
        from_cache=True,
        doubt=None,
    )
