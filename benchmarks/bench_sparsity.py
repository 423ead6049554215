"""2:4 by zipc loses less than by Model Optimizer's SparseGPT, and much less than by magnitude.

    pip install '.[demo,modelopt]'
    python benchmarks/prepare_data.py --data-dir DATA --out MADE --only stories260k
    python benchmarks/bench_sparsity.py --stsb DATA/stsb --stories MADE/stories260k

All maps of attention and FFN become 2:4 at once, nothing else changes and nothing is trained. Every
way reads the same calibration rows, without padding, drawn by three seeds. The error of a layer is
`||(W - V) x - b||^2 / ||W x||^2` on other rows, those of the search; b is what a way adds to its
bias. The score is read on the test rows. `zipc` is `numerics.sparsity.sparsify`, SparseGPT with
conjugate gradients on its mask, and a bias that keeps the mean; `refitted` does the same to the
weights that another way kept. Results go to benchmarks/results/sparsity.json.
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from provenance import commit
from torch import Tensor

from zipc.core.files import write_json
from zipc.core.request import Request
from zipc.core.types import Silent
from zipc.exporters.specialise import Edit, specialise
from zipc.metrics import lower_is_better
from zipc.model_source import load_source, settle
from zipc.numerics.sparsity import METHODS, refit, sparsify
from zipc.prepare import Prepared, prepare
from zipc.profiler.fingerprint import device_fingerprint
from zipc.pruner.compensate.least_squares import center
from zipc.pruner.evidence import InputStats, collect
from zipc.samples import Feeds, Samples, open_samples
from zipc.stage_cache import StageCache

RESULTS = Path(__file__).parent / "results" / "sparsity.json"
CALIBRATION, HELD_OUT = 512, 256  # texts, or windows of as much work
CLEARLY = 0.7  # of the error of magnitude


@dataclass(frozen=True, slots=True)
class Layer:
    """A 2:4 weight (out, in), and what is added to the bias (out,)."""

    weight: Tensor
    shift: Tensor | None = None

    def error(self, dense: Tensor, held: InputStats) -> float:
        """Squared output error on the data of `held`, relative to the dense output."""
        lost, W, gram = (dense - self.weight).double(), dense.double(), held.gram[0]
        found = float((lost @ gram * lost).sum())
        if self.shift is not None:
            b = self.shift.double()
            found += held.count * float(b @ b) - 2 * float(b @ (lost @ held.total[0]))
        return found / float((W @ gram * W).sum())


Way = dict[str, Layer]  # by module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stsb", type=Path, required=True)
    parser.add_argument("--stories", type=Path, required=True, help="made by prepare_data.py")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    requests = {
        "minilm": Request(model="minilm", data=str(arguments.stsb)),
        "stories260k": Request(
            model=str(arguments.stories / "model"), data=str(arguments.stories / "text")
        ),
    }
    runs = [run for name, request in requests.items() for run in measure(name, request, seeds)]
    summary = [summarise(name, runs) for name in requests]
    for row in summary:
        show(row)
    document = {
        "schema_version": 1,
        "claim": __doc__.splitlines()[0],
        "passed": all(all(row["checks"].values()) for row in summary),
        "commit": commit(),
        "device": device_fingerprint(runtime="torch"),
        "python": platform.python_version(),
        "modelopt": version_of_modelopt(),
        "calibration": CALIBRATION,
        "held_out": HELD_OUT,
        "summary": summary,
        "runs": runs,
    }
    write_json(arguments.output, document)
    print(f"passed: {document['passed']}; written to {arguments.output}")


def measure(name: str, request: Request, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One run a seed: the error of every layer and the score of the model, by way."""
    source = load_source(request.model)
    request = settle(request, source)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(source, request, cache=StageCache(Path(folder)), progress=Silent())
    samples = open_samples(source, request)
    modules = list(dict.fromkeys(m for s in prepared.structure.sites for m in s.maps))
    runs = []
    for seed in seeds:
        rows = samples.draw("calibration", limit=CALIBRATION, seed=seed).batches
        seen = collect(prepared.executor, rows, modules=modules)
        others = samples.draw("search", limit=HELD_OUT, seed=seed).batches
        held = collect(prepared.executor, others, modules=modules)
        ways = all_ways(prepared, seen, modelopt_weights(source.module, rows, modules))
        for way, layers in ways.items():
            score, dense = scores(prepared, samples, layers)
            errors = {m: at.error(dense_weight(prepared, m), held[m]) for m, at in layers.items()}
            runs.append(
                {
                    "model": name,
                    "seed": seed,
                    "way": way,
                    "metric": samples.metric,
                    "dense": dense,
                    "score": score,
                    "mean_error": mean(errors.values()),
                    "errors": errors,
                }
            )
            print(f"{name} seed {seed} {way}: {runs[-1]['mean_error']:.4f} {score:.4f}", flush=True)
    return runs


def all_ways(
    prepared: Prepared, seen: Mapping[str, InputStats], other: Mapping[str, Tensor]
) -> dict[str, Way]:
    """Every layer brought to 2:4 by every way, from the dense model's activations."""
    ways: dict[str, Way] = {"modelopt": {m: Layer(w) for m, w in other.items()}}
    for method, function in METHODS.items():
        ways[method] = {
            m: Layer(function(dense_weight(prepared, m), seen[m].gram[0], kept=2, of=4))
            for m in other
        }
    for way, kept in (("modelopt, refitted", "modelopt"), ("magnitude, refitted", "magnitude")):
        ways[way] = {
            m: with_bias(
                dense_weight(prepared, m),
                refit(dense_weight(prepared, m), layer.weight, centred(seen[m])),
                seen[m],
            )
            for m, layer in ways[kept].items()
        }
    ways["zipc"] = {
        m: with_bias(
            dense_weight(prepared, m),
            sparsify(dense_weight(prepared, m), centred(seen[m]), where=m),
            seen[m],
        )
        for m in other
    }
    return ways


def with_bias(dense: Tensor, sparse: Tensor, held: InputStats) -> Layer:
    lost = dense.double() - sparse.double()
    return Layer(sparse, (lost @ (held.total[0] / held.count)).float())


def centred(held: InputStats) -> Tensor:
    return center(held.gram[0], held.total[0], held.count)[0]


def dense_weight(prepared: Prepared, module: str) -> Tensor:
    return prepared.weights[prepared.calls[module].weight]


def modelopt_weights(
    module: torch.nn.Module, batches: Sequence[Feeds], modules: Sequence[str]
) -> dict[str, Tensor]:
    """What `mts.sparsify(..., "sparsegpt")` makes of each layer, rows fed one by one unpadded."""
    import modelopt.torch.sparsity as mts

    def forward_loop(model: torch.nn.Module) -> None:
        for batch in batches:
            held = batch.get("attention_mask")
            for i in range(len(next(iter(batch.values())))):
                n = None if held is None else int(held[i].sum())
                model(**{name: values[i : i + 1, :n] for name, values in batch.items()})

    sparse = mts.sparsify(
        copy.deepcopy(module), "sparsegpt", config={"forward_loop": forward_loop, "device": "cpu"}
    )
    return {m: sparse.get_submodule(m).weight.detach().clone() for m in modules}


def version_of_modelopt() -> str:
    import modelopt

    return str(modelopt.__version__)


def scores(prepared: Prepared, samples: Samples, layers: Way) -> tuple[float, float]:
    """The metric on the test rows with these layers, and that of the dense model."""
    tensors: dict[str, Any] = {}
    for module, layer in layers.items():
        call = prepared.calls[module]
        tensors[call.weight] = layer.weight.numpy()
        if layer.shift is not None:
            bias = 0.0 if call.bias is None else prepared.weights[call.bias]
            tensors[f"{module}.bias"] = (layer.shift + bias).numpy()
    dense, made = (specialise(prepared.dense, edit).to_bytes() for edit in (Edit(), Edit(tensors)))
    before, after = samples.compare(dense, made, "test")
    return after.value, before.value


def summarise(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the seeds, and whether the claim holds for a model."""
    own = [run for run in runs if run["model"] == name]
    sign = -1 if lower_is_better(own[0]["metric"]) else 1
    ways = {
        way: {
            "error": median(r["mean_error"] for r in own if r["way"] == way),
            "score": median(r["score"] for r in own if r["way"] == way),
            "scores": [r["score"] for r in own if r["way"] == way],
        }
        for way in dict.fromkeys(r["way"] for r in own)
    }
    ours, theirs, plain = ways["zipc"], ways["modelopt"], ways["magnitude"]
    return {
        "model": name,
        "metric": own[0]["metric"],
        "dense": own[0]["dense"],
        "ways": ways,
        "checks": {
            "error_at_most_modelopt": ours["error"] <= theirs["error"],
            "score_at_least_modelopt": sign * ours["score"] >= sign * theirs["score"],
            "error_well_below_magnitude": ours["error"] <= CLEARLY * plain["error"],
            "score_above_magnitude": sign * ours["score"] > sign * plain["score"],
        },
    }


def show(row: Mapping[str, Any]) -> None:
    print(f"\n{row['model']}, {row['metric']}, dense {row['dense']:.4f}")
    for way, found in row["ways"].items():
        print(f"  {way:<20} error {found['error']:.4f}  score {found['score']:.4f}")


if __name__ == "__main__":
    main()
