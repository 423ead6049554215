"""Where 2:4 is left to the search, quality is that of the better of all 2:4 and none.

    python benchmarks/bench_pattern.py --data-dir STSB [--speedups 1.2x,2x]

MiniLM is compiled for an A100 that is not here, at batch 128, with 2:4 at every site, at none, and
where the search wants it, each at the same speedup by the model of the device. The score is read
from model.onnx on the test rows. `passed` is true if `auto` scores no less than the better of the
other two less TOLERANCE, at each speedup. Results go to benchmarks/results/pattern.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from command_line import compile_model
from provenance import commit

from zipc.core.files import write_json
from zipc.exporters.sparse_weights import sparse_weights
from zipc.manifest import Manifest

RESULTS = Path(__file__).parent / "results" / "pattern.json"
BATCH = 128
TOLERANCE = 0.5  # Spearman x 100: what one seed of a search is off by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--speedups", default="1.2x,2x")
    parser.add_argument("--patterns", default="none,2:4,auto")
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--cache-dir", type=Path, help="where zipc keeps tables and stages")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = []
    for speedup in arguments.speedups.split(","):
        for pattern in arguments.patterns.split(","):
            runs.append(run(speedup, pattern, arguments))
            print("  ".join(f"{k} {v}" for k, v in runs[-1].items()), flush=True)
            document = {
                "schema_version": 1,
                "claim": __doc__.splitlines()[0],
                "passed": passed(runs),
                "commit": commit(),
                "batch": BATCH,
                "effort": arguments.effort,
                "runs": runs,
            }
            write_json(arguments.out, document)
    print(f"passed: {document['passed']}; written to {arguments.out}")


def run(speedup: str, pattern: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One compile: what it predicts, what it scores, and how many weights are 2:4."""
    with tempfile.TemporaryDirectory(prefix="zipc-bench-") as folder:
        out = Path(folder) / "out"
        words = ["minilm", "--target", "a100", "--batch-size", str(BATCH), "--speedup", speedup]
        words += ["--pattern", pattern, "--effort", arguments.effort, "--seed", arguments.seed]
        words += ["--data", str(arguments.data_dir), "-o", str(out)]
        if arguments.cache_dir is not None:
            words += ["--cache-dir", str(arguments.cache_dir)]
        ran = compile_model(words)
        ran.require_artifact()
        manifest = Manifest.read(out)
        weights = sparse_weights(onnx.load(out / "model.onnx"), folder=out)
    quality, latency = manifest.quality, manifest.latency
    assert quality is not None
    return {
        "request": speedup,
        "pattern": pattern,
        "seed": manifest.seed,
        "speedup": latency.speedup,
        "interval": latency.speedup_ci95,
        "verdict": manifest.verdict,
        "dense": quality.dense,
        "score": quality.compiled,
        "sparse_sites": sum(a.level.pattern == "2:4" for a in manifest.allocation),
        "sites": len(manifest.allocation),
        "eligible": sum(w.obstacle is None for w in weights),
        "conforming": sum(w.obstacle is None and w.conforms for w in weights),
        "allocation": [f"{a.site} {a.level}" for a in manifest.allocation],
        "notes": [note for note in latency.notes if note.startswith("2:4")],
        "compile_s": round(ran.compile_s, 1),
    }


def passed(runs: Sequence[dict[str, Any]]) -> bool:
    scores: dict[str, dict[str, float]] = {}
    for run in runs:
        scores.setdefault(run["request"], {})[run["pattern"]] = run["score"]
    whole = [found for found in scores.values() if len(found) == 3]
    return bool(whole) and all(found["auto"] >= max(found.values()) - TOLERANCE for found in whole)


if __name__ == "__main__":
    main()
