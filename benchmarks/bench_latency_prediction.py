"""The predicted latency ratio of random allocations is within 5 % of the measured one (median).

    python benchmarks/bench_latency_prediction.py [--allocations 10]

Random allocations, mixing widths and numerics, of a seed that the correction was not fitted with.
Predicted is the sum of the prices of their levels, corrected for the whole model; measured is the
median of paired ratios to the dense graph, the two timed run by run in turn. The latency table is
made first where there is none. Results go to benchmarks/results/latency_prediction.json.
"""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from provenance import commit

from zipc.core.files import write_json
from zipc.core.request import Request
from zipc.core.types import Silent
from zipc.devices import open_device
from zipc.latency_tables.store import TableStore, default_cache_dir
from zipc.model_source import load_source, settle
from zipc.prepare import prepare
from zipc.pricing import measure_points, price
from zipc.stage_cache import StageCache
from zipc.targets import load_target

RESULTS = Path(__file__).parent / "results" / "latency_prediction.json"
BAR = 0.05  # median relative error
ROUNDS = 60
MIN_SEED = 1000  # the fit of the correction uses small seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--allocations", type=int, default=10)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--seed", type=int, default=MIN_SEED)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.seed < MIN_SEED:
        parser.error(f"--seed must be at least {MIN_SEED}: the correction was fitted with others")
    torch.set_num_threads(1)
    document = measure(arguments)
    print("  predicted  measured   error")
    for row in document["allocations"]:
        print(f"  {row['predicted']:9.4f}  {row['measured']:8.4f}  {row['error']:+6.1%}")
    print(
        f"median {document['median_error']:.1%}, worst {document['worst_error']:.1%}; "
        f"uncorrected: median {document['median_error_uncorrected']:.1%}"
    )
    write_json(arguments.out, document)
    print(f"passed: {document['passed']}; written to {arguments.out}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    source = load_source(arguments.model)
    request = settle(Request(model=arguments.model, target=arguments.target), source)
    target = load_target(request.target)
    device = open_device(target)
    cache = StageCache(arguments.cache_dir)
    prepared = prepare(source, request, cache=cache, progress=Silent())
    store = TableStore(arguments.cache_dir / "tables")
    prices = price(prepared, target, request, device=device, store=store, progress=Silent())
    state = device.state()
    points = measure_points(
        prepared,
        target,
        prices,
        timer=device.timer(),
        points=arguments.allocations,
        rng=np.random.default_rng(arguments.seed),
        rounds=ROUNDS,
        progress=Silent(),
    )
    rows = []
    for raw, measured in points:
        predicted = prices.ratio(raw * prices.dense_ms)
        rows.append(
            {
                "sum_of_prices": raw,
                "predicted": predicted,
                "measured": measured,
                "error": predicted / measured - 1,
            }
        )
    errors = [abs(r["error"]) for r in rows]
    return {
        "schema_version": 1,
        "claim": __doc__.splitlines()[0],
        "passed": median(errors) <= BAR,
        "median_error": median(errors),
        "worst_error": max(errors),
        "median_error_uncorrected": median(
            abs(r["sum_of_prices"] / r["measured"] - 1) for r in rows
        ),
        "allocations": rows,
        "model": arguments.model,
        "model_sha256": prepared.source.sha256,
        "workload": request.workload.key,
        "rounds": ROUNDS,
        "seed": arguments.seed,
        "table_entries": len(prices.table.entries),
        "table_from_cache": prices.from_cache,
        "dense_ms": prices.dense_ms,
        "commit": commit(),
        "device": device.fingerprint(),
        "device_state": state,
        "versions": {n: version(n) for n in ("onnxruntime", "torch", "numpy")}
        | {"python": platform.python_version()},
    }


if __name__ == "__main__":
    main()
