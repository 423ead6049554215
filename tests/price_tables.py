"""Latency tables whose prices a test chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zipc.core.types import Level, Workload
from zipc.latency_tables.table import Entry, LatencyTable


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
