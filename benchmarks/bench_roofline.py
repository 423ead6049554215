"""A roofline is within 20 % (A100) and 30 % (Orin) of published sources it was not fitted to.

    python benchmarks/bench_roofline.py [--write]

Every source is predicted from a fit to the others; its 2:4 figures count by what they gain on the
dense ones beside them. The method is checked where truth is at hand: on the sites of
benchmarks/results/gpu_sites.json, measured on an H200: every third width, a whole network and a
batch size are predicted from the rest, and all sites with the fractions of the A100, which is what
a device without anchors gets. `--write` replaces latency_tables/modelled.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from provenance import commit

from zipc.core.files import read_json, write_json
from zipc.core.types import SpecSheet
from zipc.latency_tables import modelled
from zipc.latency_tables.fit import fit, read_sources
from zipc.latency_tables.operators import Attention, Operator, Pass, linear
from zipc.latency_tables.roofline import Fractions, Kernels
from zipc.targets import load_target

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("a100", "orin")
HEAD = 64


def sheet(target: str) -> SpecSheet:
    found = load_target(target).sheet
    assert found is not None
    return found


def family(name: str) -> modelled.DeviceModel:
    sources = read_sources(name)
    return modelled.fitted(sources, {s.target: sheet(s.target) for s in sources})


def site(entry: dict[str, Any], layers: dict[str, list[int]]) -> list[Operator]:
    """The kernels of one entry of gpu_sites.json: torch fuses nothing but attention."""
    hidden, width = layers[entry["shape"]][0], entry["width"]
    rows = entry["batch"] * entry["sequence"]
    tail = [Pass(6 * rows * hidden), Pass(4 * rows * hidden)]
    if entry["kind"] == "heads":
        heads, length = entry["batch"] * width, entry["sequence"]
        middle: list[Operator] = [Attention(heads, length, length, HEAD)]
        return [
            linear(rows, 3 * width * HEAD, hidden),
            *middle,
            linear(rows, hidden, width * HEAD),
            *tail,
        ]
    return [linear(rows, width, hidden), Pass(4 * rows * width), linear(rows, hidden, width), *tail]


class Sites:
    """Measured sites on a device, laid out for a fit."""

    def __init__(self, entries: Sequence[dict[str, Any]], layers: dict[str, list[int]]) -> None:
        networks = [site(entry, layers) for entry in entries]
        self.ms = np.array([entry["ms"] for entry in entries])
        self.begin = np.cumsum([0, *map(len, networks[:-1])])
        self.kernels = Kernels([k for n in networks for k in n], sheet("h200"))

    def log_errors(self, fractions: Fractions) -> np.ndarray:
        found = np.add.reduceat(self.kernels.milliseconds(fractions), self.begin)
        return np.log(found / self.ms)

    residuals = log_errors


def told(errors: np.ndarray) -> dict[str, float]:
    relative = np.abs(np.expm1(errors))
    return {
        "median_error": round(float(np.median(relative)), 4),
        "p95_error": round(float(np.quantile(relative, 0.95)), 4),
    }


def on_truth(start: Fractions) -> dict[str, Any]:
    """Errors on the H200: of latencies, and of ratios to the dense site."""
    truth = read_json(RESULTS / "gpu_sites.json", advice="Run measure_gpu_sites.py on a GPU.")
    entries, layers = truth["entries"], truth["layers"]
    parts = {
        "every third width": [i % 3 == 1 for i in range(len(entries))],
        "llama-1b": [e["shape"] == "llama-1b" for e in entries],
        "batch 32": [e["batch"] == 32 for e in entries],
    }
    found = {}
    for name, out in parts.items():
        kept = Sites([e for e, o in zip(entries, out, strict=True) if not o], layers)
        left = [e for e, o in zip(entries, out, strict=True) if o]
        held = Sites(left, layers)
        errors = held.log_errors(fit([kept]))
        found[name] = {"entries": len(left), **told(errors), "ratio": told(ratios(left, errors))}
    errors = Sites(entries, layers).log_errors(start)
    found["fractions of the A100"] = {
        "entries": len(entries),
        **told(errors),
        "ratio": told(ratios(entries, errors)),
    }
    return {"device": truth["device"], "entries": len(entries), "held_out": found}


def ratios(entries: Sequence[dict[str, Any]], errors: np.ndarray) -> np.ndarray:
    """Log-errors of the time of every width relative to the widest of its site and workload."""
    sites = [(e["shape"], e["kind"], e["batch"], e["sequence"]) for e in entries]
    widest = {s: i for i, s in enumerate(sites)}  # widths ascend
    return np.array([errors[i] - errors[widest[s]] for i, s in enumerate(sites)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the shipped models")
    arguments = parser.parse_args()
    models = {name: family(name) for name in FAMILIES}
    for name, model in models.items():
        print(f"{name}: {model.fractions}")
        for held in model.held_out:
            print(
                f"  {held.source:34} {held.figures:3} figures: off by {held.median_error:.1%} "
                f"(median), {held.worst_error:.1%} (worst)"
            )
        for kind, half in model.half_width.items():
            print(f"  95 % interval of ratios that differ in {kind}: x {math.exp(half):.2f}")
    truth = on_truth(models["a100"].fractions)
    print(f"{truth['device']}: {truth['entries']} measured sites")
    for name, row in truth["held_out"].items():
        print(
            f"  {name:24} {row['entries']:3}: off by {row['median_error']:.1%}, "
            f"ratios to dense by {row['ratio']['median_error']:.1%} (median), "
            f"{row['ratio']['p95_error']:.1%} (95 % quantile)"
        )
    document = {name: model.model_dump(mode="json") for name, model in models.items()}
    write_json(
        RESULTS / "roofline.json", {"commit": commit(), "families": document, "truth": truth}
    )
    if arguments.write:
        write_json(modelled.FILE, document)


if __name__ == "__main__":
    main()
