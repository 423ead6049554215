"""INT8 by zipc is nearer to the dense model than ONNX Runtime's and Model Optimizer's defaults.

    pip install '.[demo,modelopt]'
    python benchmarks/prepare_data.py --data-dir DATA --out MADE
    python benchmarks/bench_int8.py --stsb DATA/stsb --made MADE --weights DATA/resnet_cifar10

The same weights and the same calibration rows, without padding, drawn by three seeds, go through
every way of rounding; nothing is pruned or trained. The error is `||y - y'|| / ||y||` of the whole
output on rows of dev, the score is read on the test rows. `zipc` is what `--no-prune --numerics
int8-static` ships, `zipc dynamic` the same with `int8-dynamic`, `zipc rounded sums` what a network
of convolutions ships where exact sums are too slow for the speed asked for; `onnxruntime static`
and `dynamic` are its quantizers after its own preprocessing, with their default settings;
`modelopt` is what `mtq.INT8_DEFAULT_CFG` simulates, left out where it is not installed, and
`modelopt in our graph` the ranges and rounding it found, of the maps that both round. With seed 0
every graph of ONNX Runtime is timed in turns with the dense one, on one thread; `batch_deviation`
is how far a row alone may be from itself in a batch. Results go to benchmarks/results/int8.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import logging
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_families import save_data, save_model
from provenance import commit

from zipc.build import dense_model, edit_of
from zipc.core.files import read_json, write_json
from zipc.core.request import Request
from zipc.core.types import Allocation, Level, Silent, Site, Workload
from zipc.exporters.specialise import specialise
from zipc.integer_body import RANGES, IntegerBody
from zipc.model_source import load_source, settle
from zipc.numerics.int8 import DYNAMIC, STATIC
from zipc.prepare import Prepared, prepare
from zipc.profiler.fingerprint import device_fingerprint
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.proof import paired_speedup
from zipc.pruner.compensate.propagate import propagate
from zipc.pruner.evidence import collect
from zipc.pruner.graph.passages import passages
from zipc.pruner.graph.sites import sizes_at
from zipc.pruner.levels import Levels
from zipc.pruner.on_grid import on_grid
from zipc.pruner.states import States
from zipc.quantizer import by_modelopt, quantised, takes, unpadded
from zipc.runtimes import integer_kernels
from zipc.samples import Feeds, open_samples
from zipc.stage_cache import StageCache

RESULTS = Path(__file__).parent / "results" / "int8.json"
NETWORKS = Path(__file__).parent / "networks.py"
CALIBRATION, HELD_OUT = 256, 128  # short texts, or windows and images of as much work
CONVOLUTIONS = 8  # times the work: an image is small
LOSES_AT_MOST = 0.5  # points of accuracy that ResNet-56 may lose
SLOWER_AT_MOST = 1.1  # static than dynamic, where a result does not depend on batch-mates
ROUNDING = 1e-2  # ties that fall the other way in a batch of another length
PAIRS = 60
OURS, THEIRS = "zipc", ("onnxruntime static", "onnxruntime dynamic", "modelopt")
ROUNDED = f"{OURS} rounded sums"
TIMED = (OURS, f"{OURS} dynamic", ROUNDED, *THEIRS[:2])
INSTALLED = importlib.util.find_spec("modelopt") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stsb", type=Path, required=True)
    parser.add_argument("--made", type=Path, required=True, help="made by prepare_data.py")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the safetensors")
    parser.add_argument("--models", default="minilm,stories260k,bert-base,resnet56")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget the runs in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the quantizers advise
    held = {} if arguments.fresh or not arguments.out.is_file() else read_json(arguments.out)
    runs: list[dict[str, Any]] = held.get("runs", [])
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    for name in arguments.models.split(","):
        runs = [run for run in runs if run["model"] != name or run["seed"] not in seeds]
        with tempfile.TemporaryDirectory(prefix="zipc-bench-") as folder:
            request = request_of(name, arguments, Path(folder))
            runs += measure(name, request, seeds)
        write_json(arguments.out, document(runs))
    for row in document(runs)["summary"]:
        show(row)
    print(f"passed: {document(runs)['passed']}; written to {arguments.out}")


def request_of(name: str, arguments: argparse.Namespace, folder: Path) -> Request:
    if name == "minilm":
        return Request(model="minilm", data=str(arguments.stsb))
    if name == "resnet56":
        weights, images = arguments.weights / "resnet56.safetensors", arguments.made / "cifar10"
        return Request(model=f"{NETWORKS}:resnet56", weights=str(weights), data=str(images))
    if name == "stories260k":
        made = arguments.made / name
        return Request(model=str(made / "model"), data=str(made / "text"))
    save_model("BertModel", {}, folder / "model")  # the default shape is that of BERT-base
    save_data("BertModel", "text", folder / "data.npz")
    return Request(model=str(folder / "model"), data=str(folder / "data.npz"))


def measure(name: str, request: Request, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One run a seed and way: error on rows of dev and score on test."""
    source = load_source(request.model, weights=request.weights)
    request = settle(request, source)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(source, request, cache=StageCache(Path(folder)), progress=Silent())
    samples = open_samples(source, request)
    dense = dense_model(prepared)
    convolutions = not any(map(prepared.on_integers, prepared.structure.sites))
    factor = CONVOLUTIONS if convolutions else 1
    runs = []
    for seed in seeds:
        rows = samples.draw("calibration", limit=factor * CALIBRATION, seed=seed).batches
        held = samples.draw("dev", limit=factor * HELD_OUT, seed=seed).batches
        exact = outputs(prepared, dense, held)
        if convolutions:
            ways = convolutional(prepared, rows, request.workload)
        else:
            ways = linear(prepared, rows)
        ways["onnxruntime static"] = by_onnxruntime(prepared, rows, static=True)
        ways["onnxruntime dynamic"] = by_onnxruntime(prepared, rows, static=False)
        simulated = {"modelopt": simulation(prepared, rows, held)} if INSTALLED else {}
        found = {way: outputs(prepared, model, held) for way, model in ways.items()} | simulated
        for way, values in found.items():
            score = dense_score = None
            if way in ways:
                before, after = samples.compare(dense, ways[way], "test")
                dense_score, score = before.value, after.value
            runs.append(
                {
                    "model": name,
                    "seed": seed,
                    "way": way,
                    "commit": commit(),
                    "metric": samples.metric,
                    "rows": sum(len(next(iter(batch.values()))) for batch in rows),
                    "error": error(exact, values, held),
                    "dense": dense_score,
                    "score": score,
                }
            )
            print("  ".join(f"{k} {v}" for k, v in runs[-1].items()), flush=True)
        if seed == 0:
            for run in runs:
                if run["way"] in TIMED:
                    run |= times(dense, ways[run["way"]], request)
                    run["batch_deviation"] = samples.deviation(ways[run["way"]], "test")
    return runs


def linear(prepared: Prepared, rows: Sequence[Feeds]) -> dict[str, bytes]:
    """A network of linear maps in INT8, repaired on the calibration rows."""
    levels = levels_on(prepared, rows)
    ways = {}
    for way, numeric in ((OURS, STATIC), (f"{OURS} dynamic", DYNAMIC)):
        at = unpruned(prepared, numeric)
        ways[way] = graph(prepared, at, propagate(prepared.executor, levels, at, rows))
    if INSTALLED:
        floats = levels.states(unpruned(prepared, "fp32"))
        at = unpruned(prepared, STATIC, where=takes)
        theirs = by_modelopt(prepared, at, floats, rows)
        ways["modelopt in our graph"] = graph(prepared, at, theirs)
    return ways


def convolutional(
    prepared: Prepared, rows: Sequence[Feeds], workload: Workload
) -> dict[str, bytes]:
    """A network of convolutions in INT8 as a whole; ranges by what costs least on these rows."""
    dense, body = dense_model(prepared), IntegerBody(workload, row_bytes=prepared.dense.row_bytes())
    body = body.calibrated_on([prepared.for_graph(batch) for batch in rows])
    exact = outputs(prepared, dense, rows)
    levels, at = levels_on(prepared, rows), unpruned(prepared, "fp32")
    states = on_grid(levels, at, levels.states(at), limit=body.weight_limit)
    fed_back = graph(prepared, at, states)

    def lost(model: bytes) -> float:
        return error(exact, outputs(prepared, model, rows), rows)

    def best(exact_sums: bool) -> bytes:
        way = replace(body, exact_sums=exact_sums)
        return min((replace(way, ranges=ranges).emit(fed_back) for ranges in RANGES), key=lost)

    return {OURS: best(True), ROUNDED: best(False)}


def levels_on(prepared: Prepared, rows: Sequence[Feeds]) -> Levels:
    """Weights of every map, with what it reads on the rows."""
    modules = list(dict.fromkeys(m for s in prepared.structure.sites for m in s.maps))
    stats = collect(prepared.executor, rows, modules=modules)
    return Levels(
        *(prepared.sites, prepared.calls, prepared.weights, stats, {}),
        passages=passages(prepared.program, prepared.structure.sites),
    )


def unpruned(
    prepared: Prepared, numeric: str, *, where: Callable[[Site], bool] = lambda _: True
) -> Allocation:
    """Every site whole, and in a numeric where it can be and shall be."""
    levels = {
        name: Level(site.units, numeric if prepared.on_integers(site) and where(site) else "fp32")
        for name, site in prepared.sites.items()
    }
    return Allocation(levels, 0.0, 0.0)


def graph(prepared: Prepared, allocation: Allocation, states: States) -> bytes:
    edit = edit_of(states, sizes_at(prepared.structure, allocation.widths))
    return specialise(prepared.dense, edit).to_bytes()


def by_onnxruntime(prepared: Prepared, rows: Sequence[Feeds], *, static: bool) -> bytes:
    """What ONNX Runtime's quantizers make of the plain export with their default settings."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    left = iter([prepared.for_graph(row) for row in unpadded(rows)])
    reader = type("Reader", (q.CalibrationDataReader,), {"get_next": lambda _: next(left, None)})
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, made = (str(Path(folder) / f"{n}.onnx") for n in ("plain", "ready", "made"))
        Path(plain).write_bytes(prepared.dense.to_bytes())
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        if static:
            q.quantize_static(ready, made, reader())
        else:
            q.quantize_dynamic(ready, made)
        return Path(made).read_bytes()


def simulation(
    prepared: Prepared, rows: Sequence[Feeds], held: Sequence[Feeds]
) -> list[np.ndarray]:
    """Outputs of Model Optimizer's own simulation of its default."""
    module = quantised(copy.deepcopy(prepared.source.module), rows)
    with torch.no_grad():
        return [prepared.source.chosen(module(**batch))[0].numpy() for batch in held]


def outputs(prepared: Prepared, model: bytes, held: Sequence[Feeds]) -> list[np.ndarray]:
    runner = OnnxRuntimeRunner(model, workload=Workload(), feeds=prepared.for_graph(held[0]))
    name = prepared.source.outputs[0][1]
    return [runner.outputs(prepared.for_graph(batch))[name] for batch in held]


def error(exact: Sequence[np.ndarray], found: Sequence[np.ndarray], held: Sequence[Feeds]) -> float:
    """Norm of the difference over that of the dense output, without what belongs to padding."""
    lost = whole = 0.0
    for a, b, batch in zip(exact, found, held, strict=True):
        mask = batch.get("attention_mask")
        kept = np.ones(1) if mask is None or a.ndim < 3 else mask.numpy()[..., None]
        lost += float(np.square((a - b).astype(np.float64) * kept).sum())
        whole += float(np.square(a.astype(np.float64) * kept).sum())
    return float((lost / whole) ** 0.5)


def times(dense: bytes, model: bytes, request: Request) -> dict[str, Any]:
    """Speedup over the dense graph, run by run in turns, and the integer kernels that run."""
    runners = [OnnxRuntimeRunner(m, workload=request.workload) for m in (dense, model)]
    timing = paired_speedup(*runners, pairs=PAIRS)
    return {
        "speedup": timing.speedup,
        "interval": timing.ci95,
        "dense_ms": median(timing.reference_ms),
        "integer_kernels": integer_kernels(model),
    }


def document(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary = [summarise(name, runs) for name in dict.fromkeys(run["model"] for run in runs)]
    return {
        "schema_version": 1,
        "claim": __doc__.splitlines()[0],
        "passed": all(all(row["checks"].values()) for row in summary),
        "device": device_fingerprint(runtime="onnxruntime"),
        "python": platform.python_version(),
        "modelopt": importlib.metadata.version("nvidia-modelopt") if INSTALLED else None,
        "summary": summary,
        "runs": list(runs),
    }


def summarise(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds, and whether the claim holds for a model."""
    own = [run for run in runs if run["model"] == name]
    ways: dict[str, dict[str, Any]] = {}
    for way in dict.fromkeys(run["way"] for run in own):
        some = [run for run in own if run["way"] == way]
        ways[way] = {
            key: median(found)
            for key in ("error", "score", "speedup", "batch_deviation")
            if (found := [run[key] for run in some if run.get(key) is not None])
        }
    ours, dense = ways[OURS], own[0]["dense"]
    checks = {f"error_below_{w}": ours["error"] < ways[w]["error"] for w in THEIRS if w in ways}
    if "speedup" in ours:
        checks["faster_than_onnxruntime_static"] = ours["speedup"] > ways[THEIRS[0]]["speedup"]
    if f"{OURS} dynamic" not in ways:
        checks["near_dense"] = ours["score"] >= dense - LOSES_AT_MOST
    elif "speedup" in ours:
        dynamic = ways[f"{OURS} dynamic"]["speedup"]
        checks["static_about_as_fast_as_dynamic"] = ours["speedup"] >= dynamic / SLOWER_AT_MOST
        checks["rows_alone_are_as_in_a_batch"] = ours["batch_deviation"] <= ROUNDING
    return {
        "model": name,
        "metric": own[0]["metric"],
        "dense": dense,
        "ways": ways,
        "checks": checks,
    }


def show(row: dict[str, Any]) -> None:
    print(f"\n{row['model']}, {row['metric']}, dense {row['dense']:.4f}")
    for way, found in row["ways"].items():
        print(f"  {way:<22}" + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))


if __name__ == "__main__":
    main()
