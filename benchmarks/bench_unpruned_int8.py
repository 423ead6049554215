"""MiniLM in INT8, nothing removed: 2.55 times as fast (OpenVINO: 2.4), 0.3 points of Spearman lost.

    pip install '.[demo,openvino]'
    python benchmarks/bench_unpruned_int8.py --data-dir STSB

STSB is a folder with train.csv, dev.csv and test.csv of the whole STS benchmark. The command line
compiles with `--no-prune --numerics int8` for one thread, once per seed and runtime; each speedup
is over the dense model in fp32 on the same runtime, which OpenVINO is held to, and is that of the
proof; Spearman x 100 is read from `model.onnx` on the test rows. Results go to
benchmarks/results/unpruned_int8.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from command_line import compile_model
from provenance import commit

from zipc.core.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "unpruned_int8.json"
FASTER = {"onnxruntime": 2.55, "openvino": 2.4}
LEAST = 81.7  # Spearman x 100; dense has 82.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--runtimes", default=",".join(FASTER))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = []
    for runtime in arguments.runtimes.split(","):
        for seed in arguments.seeds.split(","):
            runs.append(one_run(runtime, seed, arguments.data_dir))
            print("  ".join(f"{k} {v}" for k, v in runs[-1].items() if k != "device"), flush=True)
            write_json(arguments.out, document(runs))
    print(f"passed: {document(runs)['passed']}; written to {arguments.out}")


def one_run(runtime: str, seed: str, data: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="zipc-bench-") as folder:
        out = Path(folder) / "out"
        flags = ["minilm", "--runtime", runtime, "--no-prune", "--numerics", "int8"]
        ran = compile_model([*flags, "--data", str(data), "--seed", seed, "-o", str(out)])
        ran.require_artifact()
        manifest = read_json(out / "manifest.json")
    latency, quality = manifest["latency"], manifest["quality"]
    return {
        "runtime": runtime,
        "seed": int(seed),
        "commit": commit(),
        "speedup": latency["speedup"],
        "speedup_ci95": latency["speedup_ci95"],
        "reference_ms": latency["reference_ms"],
        "dense": quality["dense"],
        "spearman": quality["compiled"],
        "batch_deviation": quality["batch_deviation"],
        "compile_s": round(ran.compile_s, 1),
        "device": latency["fingerprint"],
    }


def document(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary = {}
    for runtime in dict.fromkeys(run["runtime"] for run in runs):
        own = [run for run in runs if run["runtime"] == runtime]
        summary[runtime] = {k: median(run[k] for run in own) for k in ("speedup", "spearman")}
    return {
        "schema_version": 1,
        "claim": __doc__.splitlines()[0],
        "passed": all(
            found["speedup"] >= FASTER[runtime] and found["spearman"] >= LEAST
            for runtime, found in summary.items()
        ),
        "summary": summary,
        "runs": list(runs),
    }


if __name__ == "__main__":
    main()
