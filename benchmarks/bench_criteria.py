"""At the same widths, what zipc keeps scores better than units kept by magnitude or at random.

    python benchmarks/prepare_data.py --data-dir DATA --out MADE --only stories260k
    python benchmarks/bench_criteria.py --stsb DATA/stsb --stories MADE/stories260k

Each request is compiled by the command line in fp32, once per seed. The rivals get the very widths
that zipc's search found, so the same speed, and choose other units: by the magnitude of the columns
that read them, and at random. Each is scored as it is, and with zipc's least-squares repair of what
stays. Nothing is trained; the scores are those of the test rows, read from ONNX graphs. Results go
to benchmarks/results/criteria.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from command_line import compile_model
from provenance import commit

from zipc.build import edit_of
from zipc.core.files import read_json, write_json
from zipc.core.request import Request
from zipc.core.types import Allocation, Level, Silent
from zipc.exporters.specialise import Edit, specialise
from zipc.metrics import lower_is_better
from zipc.model_source import load_source, settle
from zipc.prepare import Prepared, prepare
from zipc.profiler.fingerprint import device_fingerprint
from zipc.pruner.evidence import collect
from zipc.pruner.graph.sites import sizes_at
from zipc.pruner.ladder import sweep_site
from zipc.pruner.levels import Levels
from zipc.samples import Samples, open_samples
from zipc.stage_cache import StageCache

RESULTS = Path(__file__).parent / "results" / "criteria.json"
RIVALS = ("magnitude", "random")
REPAIRS = {"": "none", ", repaired": "least_squares"}
CALIBRATION = 512  # texts, or windows of as much work


@dataclass(frozen=True, slots=True)
class Asked:
    """A model, what it reads, and the flags of a compile."""

    name: str
    model: str
    data: Path
    speedup: str
    length: int

    @property
    def flags(self) -> list[str]:
        return [
            *(self.model, "--data", str(self.data), "--numerics", "fp32"),
            *("--speedup", self.speedup, "--sequence-length", str(self.length)),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stsb", type=Path, required=True)
    parser.add_argument("--stories", type=Path, required=True, help="made by prepare_data.py")
    parser.add_argument("--models", default="stories260k,minilm")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget the runs in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stories = arguments.stories
    every = [
        Asked("stories260k", str(stories / "model"), stories / "text", "1.3x", 256),
        Asked("minilm", "minilm", arguments.stsb, "2x", 128),
    ]
    held = {} if arguments.fresh or not arguments.out.is_file() else read_json(arguments.out)
    runs: list[dict[str, Any]] = held.get("runs", [])
    for asked in (a for a in every if a.name in arguments.models.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            if any((r["model"], r["seed"]) == (asked.name, seed) for r in runs):
                continue
            runs.append(one_run(asked, seed, arguments.cache_dir))
            write_json(arguments.out, document(runs))
            print({k: v for k, v in runs[-1].items() if k != "widths"}, flush=True)
    print(f"passed: {document(runs)['passed']}; written to {arguments.out}")


def one_run(asked: Asked, seed: int, cache: Path | None) -> dict[str, Any]:
    """Compile, then give its widths to every rival."""
    with tempfile.TemporaryDirectory(prefix="zipc-bench-") as folder:
        out = Path(folder) / "out"
        flags = [*asked.flags, "--seed", str(seed), "-o", str(out)]
        ran = compile_model([*flags, "--cache-dir", str(cache or Path(folder) / "cache")])
        ran.require_artifact()
        manifest = read_json(out / "manifest.json")
        widths = {a["site"]: a["level"]["width"] for a in manifest["allocation"]}
        rivals = rival_scores(asked, widths, seed, Path(folder))
    return {
        "model": asked.name,
        "asked": asked.speedup,
        "seed": seed,
        "commit": commit(),
        "verdict": manifest["verdict"],
        "speedup": manifest["latency"]["speedup"],
        "compile_s": round(ran.compile_s, 1),
        "metric": manifest["quality"]["metric"],
        "dense": manifest["quality"]["dense"],
        "scores": {"zipc": manifest["quality"]["compiled"]} | rivals,
        "widths": widths,
    }


def rival_scores(
    asked: Asked, widths: Mapping[str, int], seed: int, folder: Path
) -> dict[str, float]:
    """The test score of every rival, plain and repaired."""
    request = Request(model=asked.model, data=str(asked.data), sequence_length=asked.length)
    source = load_source(request.model)
    request = settle(request, source)
    prepared = prepare(source, request, cache=StageCache(folder / "stages"), progress=Silent())
    samples = open_samples(source, request)
    rows = samples.draw("calibration", limit=CALIBRATION, seed=seed).batches
    modules = list(dict.fromkeys(m for s in prepared.structure.sites for m in s.maps))
    stats = collect(prepared.executor, rows, modules=modules)
    allocation = Allocation({n: Level(w) for n, w in widths.items()}, 0.0, 0.0)
    found = {}
    for rival in RIVALS:
        sweeps = {
            site.name: sweep_site(
                site, prepared.weights, stats, prepared.calls, criterion=rival, seed=seed
            )
            for site in prepared.structure.sites
        }
        for told, repair in REPAIRS.items():
            levels = Levels(
                *(prepared.sites, prepared.calls, prepared.weights, stats, sweeps),
                compensator=repair,
            )
            found[rival + told] = score(prepared, samples, levels, allocation)
    return found


def score(prepared: Prepared, samples: Samples, levels: Levels, allocation: Allocation) -> float:
    """Of the test rows, read from the ONNX graph of an allocation."""
    sizes = sizes_at(prepared.structure, allocation.widths)
    edits = (Edit(), edit_of(levels.states(allocation), sizes))
    dense, made = (specialise(prepared.dense, edit).to_bytes() for edit in edits)
    _, after = samples.compare(dense, made, "test")
    return after.value


def document(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: the runs, and medians over the seeds of each model."""
    summary = [summarise(name, runs) for name in dict.fromkeys(r["model"] for r in runs)]
    return {
        "schema_version": 1,
        "claim": __doc__.splitlines()[0],
        "passed": all(row["passed"] for row in summary),
        "device": device_fingerprint(runtime="onnxruntime"),
        "summary": summary,
        "runs": runs,
    }


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    own = [run for run in runs if run["model"] == name]
    sign = -1 if lower_is_better(own[0]["metric"]) else 1
    scores = {way: median(r["scores"][way] for r in own) for way in own[0]["scores"]}
    return {
        "model": name,
        "asked": own[0]["asked"],
        "seeds": len(own),
        "verdicts": [r["verdict"] for r in own],
        "speedup": median(r["speedup"] for r in own),
        "metric": own[0]["metric"],
        "dense": own[0]["dense"],
        "scores": scores,
        "passed": all(
            sign * run["scores"]["zipc"] > sign * value
            for run in own
            for way, value in run["scores"].items()
            if way != "zipc"
        ),
    }


if __name__ == "__main__":
    main()
