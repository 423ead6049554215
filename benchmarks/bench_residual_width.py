"""At equal multiply-adds, a narrower residual stream costs a Llama more than narrower blocks.

    python benchmarks/prepare_data.py --data-dir DIR --out OUT --only stories260k
    python benchmarks/bench_residual_width.py --stories OUT/stories260k

The residual width is cut in the order of structured OBS over all its readers, which are refitted;
against it stands the same share of every FFN and of the heads of every attention, unsearched. The
loss is that of the search: KL to the dense model on rows it was not calibrated on. The embedding
is untied from the head first, since tied ones keep their width. Nothing is timed. Results go to
benchmarks/results/residual_width.json.
"""

from __future__ import annotations

import argparse
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from provenance import commit

from zipc.core.files import write_json
from zipc.core.quiet import hush
from zipc.core.request import Request
from zipc.core.types import Allocation, Level
from zipc.model_source import load_source, settle, trace_source
from zipc.prepare import discover
from zipc.profiler.fingerprint import device_fingerprint
from zipc.pruner.allocate.scorer import Scorer
from zipc.pruner.evidence import collect
from zipc.pruner.graph.interpret import Executor
from zipc.pruner.ladder import sweep_site
from zipc.pruner.levels import Levels
from zipc.samples import open_samples

RESULTS = Path(__file__).parent / "results" / "residual_width.json"
LENGTH, CALIBRATION, SCORED = 256, 256, 64
SHARES = (0.875, 0.75, 0.625, 0.5)  # of the residual width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", type=Path, required=True, help="the prepared folder")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory(prefix="zipc-bench-") as folder:
        untie(arguments.stories / "model", Path(folder))
        for seed in map(int, arguments.seeds.split(",")):
            for run in losses(folder, str(arguments.stories / "text"), seed):
                print(run, flush=True)
                runs.append(run)
    document = {"commit": commit(), "device": device_fingerprint(runtime="onnxruntime")}
    write_json(arguments.out, document | {"rows": [CALIBRATION, SCORED], "runs": runs})


def untie(source: Path, out: Path) -> None:
    """Save the model with a head of its own."""
    import transformers

    with hush():
        tied = transformers.AutoModelForCausalLM.from_pretrained(source)
        state = {n: t.clone() for n, t in tied.state_dict().items()}
        tied.config.tie_word_embeddings = False
        free = transformers.LlamaForCausalLM(tied.config)
        free.load_state_dict(state)
        free.save_pretrained(out)
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(out)


def losses(model: str, data: str, seed: int) -> list[dict[str, Any]]:
    """Loss and multiply-adds of narrower residual streams, and of blocks as cheap as those."""
    request = Request(model=model, data=data, sequence_length=LENGTH, seed=seed)
    source = load_source(model)
    request = settle(request, source)
    program = trace_source(source, batch=1)
    structure = discover(source, program, include=(), exclude=())
    sites = {s.name: s for s in structure.sites}
    calls, weights = {c.module: c for c in program.maps}, dict(program.tensors.values())
    executor, samples = Executor(program, structure), open_samples(source, request)
    rows = samples.draw("calibration", limit=CALIBRATION, seed=seed).batches
    stats = collect(executor, rows, modules=list(calls), seed=seed)
    sweeps = {n: sweep_site(s, weights, stats, calls, seed=seed) for n, s in sites.items()}
    levels = Levels(sites, calls, weights, stats, sweeps)
    drawn = samples.draw("search", limit=SCORED, seed=seed)
    scorer = Scorer(
        executor, levels, drawn.batches, readout=drawn.readout, oracle=drawn.oracle, prefixes=False
    )

    dense = sum(weights[c.weight].numel() for c in program.maps)

    def cost(widths: dict[str, int]) -> float:
        """Multiply-adds of all maps, relative to dense."""
        maps = [(c.weight, weights[c.weight].shape) for c in program.maps]
        return sum(prod(levels.cuts.shape(name, shape, widths)) for name, shape in maps) / dense

    def loss(widths: dict[str, int]) -> float:
        return scorer.score(Allocation({n: Level(w) for n, w in widths.items()}, 0.0, 0.0))

    (stream,) = (s for s in structure.sites if s.kind == "width")
    inner = [s for s in structure.sites if s.kind != "width"]
    found = []
    for share in SHARES:
        narrow = {stream.name: round(share * stream.units)}
        percents = range(100, 0, -1)
        uniform = ({s.name: max(1, round(p / 100 * s.units)) for s in inner} for p in percents)
        blocks = next(widths for widths in uniform if cost(widths) <= cost(narrow))
        found.append(
            {
                "seed": seed,
                "residual_width": [narrow[stream.name], stream.units],
                "multiply_adds": round(cost(narrow), 3),
                "loss": round(loss(narrow), 4),
                "blocks_multiply_adds": round(cost(blocks), 3),
                "blocks_loss": round(loss(blocks), 4),
            }
        )
    return found


if __name__ == "__main__":
    main()
