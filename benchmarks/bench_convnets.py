"""A CIFAR ResNet pruned by zipc keeps more accuracy than its rivals at the same measured latency.

    python benchmarks/prepare_data.py --data-dir DIR --out OUT --only cifar10
    python benchmarks/bench_convnets.py --images OUT/cifar10 --weights DIR/resnet_cifar10

Nothing is trained. zipc searches on augmented train images; test.npz is read once, by the report of
each compile and for the rivals. The rivals are Torch-Pruning's (`pip install torch-pruning`):
filters by magnitude, by first-order Taylor expansion and at random. They cut the width inside the
blocks, since the shortcut of these networks pads channels by a number that they do not rewrite.
Each gets the least uniform pruning ratio at which it measures as fast as zipc's model, through
zipc's own export, and its BatchNorm statistics estimated anew on the calibration images. They only
prune, so zipc is compared without INT8; --numerics auto shows it with INT8, without rivals. Results
go to benchmarks/results/convnets.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from command_line import compile_model
from provenance import commit
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from zipc.core.files import read_json, write_json
from zipc.core.types import Workload
from zipc.exporters.finish import finish
from zipc.exporters.onnx_export import export_dense
from zipc.metrics import accuracy, paired_bootstrap
from zipc.profiler.fingerprint import device_fingerprint
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.proof import paired_speedup
from zipc.pruner.graph.trace import trace
from zipc.user_code import load_function

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "convnets.json"
NETWORKS = HERE / "networks.py"
RIVALS = ("magnitude", "taylor", "random")
BATCH = 100
STATISTICS = 4096  # images for BatchNorm statistics, as many as zipc calibrates on
RATIOS = np.linspace(0.05, 0.95, 37)
PAIRS = 120
REACHED: dict[int, float] = {}  # index of a ratio -> measured speedup
RESAMPLES = 2000  # of the images, for the intervals

Images = tuple[Tensor, Tensor]  # (images, 3, 32, 32) normalised; labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="train.npz and test.npz")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the safetensors")
    parser.add_argument("--network", default="resnet56", choices=["resnet20", "resnet56"])
    parser.add_argument("--speedups", default="1.3,1.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--numerics", default="fp32", help="auto: in INT8, without rivals")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget the runs in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    held = {} if arguments.fresh or not arguments.out.is_file() else read_json(arguments.out)
    runs: list[dict[str, Any]] = held.get("runs", [])
    for seed in map(int, arguments.seeds.split(",")):
        for speedup in arguments.speedups.split(","):
            key = {
                "network": arguments.network,
                "numerics": arguments.numerics,
                "asked": float(speedup),
                "seed": seed,
            }
            if any(key.items() <= run.items() for run in runs):
                continue
            runs.append(key | one_run(arguments, speedup, seed))
            write_json(arguments.out, document(runs))
            print(line(runs[-1]), flush=True)
    print(f"passed: {document(runs)['passed']}; written to {arguments.out}")


def one_run(arguments: argparse.Namespace, speedup: str, seed: int) -> dict[str, Any]:
    """Compile; then give every rival the same latency, and read all on the same images."""
    test = images(arguments.images / "test.npz")
    with tempfile.TemporaryDirectory(prefix="zipc-bench-") as folder:
        out = Path(folder) / "out"
        seconds = compile_(arguments, speedup, seed, out)
        manifest = read_json(out / "manifest.json")
        reference, ours = (out / n for n in ("reference.onnx", "model.onnx"))
        dense, right = classes(reference.read_bytes(), test), classes(ours.read_bytes(), test)
        base = runner(reference.read_bytes())
        fast = paired_speedup(base, runner(ours.read_bytes()), pairs=PAIRS).speedup
    train = images(arguments.images / "train.npz", rng=torch.Generator().manual_seed(seed))
    rivals: dict[str, Any] = {}
    alike = RIVALS if arguments.numerics == "fp32" else ()  # the rivals only prune
    ratio = as_fast(lambda: build(arguments), base, fast, train) if alike else 0.0
    for rival in alike:
        made = exported(prune(build(arguments), rival, ratio, train, seed))
        theirs = classes(made, test)
        rivals[rival] = {
            "pruning_ratio": ratio,
            "speedup": paired_speedup(base, runner(made), pairs=PAIRS).speedup,
            "accuracy": score(theirs),
            "ours_minus_theirs": difference(right, theirs),
        }
    return {
        "commit": commit(),
        "verdict": manifest["verdict"],
        "speedup": manifest["latency"]["speedup"],
        "speedup_in_turn": fast,
        "compile_s": round(seconds, 1),
        "dense": score(dense),
        "accuracy": score(right),
        "minus_dense": difference(right, dense),
        "rivals": rivals,
    }


def compile_(arguments: argparse.Namespace, speedup: str, seed: int, out: Path) -> float:
    """Compile to a folder; returns the seconds it took."""
    flags = [f"{NETWORKS}:{arguments.network}", "--numerics", arguments.numerics]
    flags += ["--weights", str(weights(arguments)), "--data", str(arguments.images)]
    flags += ["--speedup", f"{speedup}x", "--seed", str(seed), "-o", str(out)]
    if arguments.cache_dir is not None:
        flags += ["--cache-dir", str(arguments.cache_dir)]
    ran = compile_model(flags)
    ran.require_artifact()
    return ran.compile_s


def weights(arguments: argparse.Namespace) -> Path:
    path: Path = arguments.weights / f"{arguments.network}.safetensors"
    return path


def build(arguments: argparse.Namespace) -> nn.Module:
    factory, _ = load_function(f"{NETWORKS}:{arguments.network}")
    module: nn.Module = factory()
    module.load_state_dict(load_file(weights(arguments)), strict=False)
    return module.eval()


def as_fast(
    dense: Callable[[], nn.Module], base: OnnxRuntimeRunner, speedup: float, train: Images
) -> float:
    """The least ratio at which the rivals are as fast; their widths are the same at equal ratios.

    The times of other seeds are taken up: they depend on the widths alone.
    """
    low, high = 0, len(RATIOS) - 1
    while low < high:
        middle = (low + high) // 2
        if middle not in REACHED:
            graph = exported(prune(dense(), "random", float(RATIOS[middle]), train, 0))
            REACHED[middle] = paired_speedup(base, runner(graph), pairs=PAIRS).speedup
        if REACHED[middle] >= speedup:
            high = middle
        else:
            low = middle + 1
    return float(RATIOS[low])


def prune(module: nn.Module, rival: str, ratio: float, train: Images, seed: int) -> nn.Module:
    """Cut the width inside every block, uniformly, and estimate BatchNorm statistics anew."""
    import torch_pruning as tp

    torch.manual_seed(seed)
    x, y = train
    inner = {m for n, m in module.named_modules() if n.endswith(".conv1") and "layer" in n}
    others = [
        m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner
    ]
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance(),
        "random": tp.importance.RandomImportance(),
    }[rival]
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    pruner = tp.pruner.BasePruner(
        module, x[:1], importance=importance, pruning_ratio=ratio, ignored_layers=others
    )
    if rival == "taylor":
        F.cross_entropy(module(x[:512]), y[:512]).backward()
    pruner.step()
    return restated(module, x[:STATISTICS])


@torch.no_grad()
def restated(module: nn.Module, x: Tensor) -> nn.Module:
    """The module, with BatchNorm statistics of these images: the mean over batches."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    module.train()
    for part in x.split(256):
        module(part)
    return module.eval().requires_grad_(False)


def exported(module: nn.Module) -> bytes:
    example, axes = {"x": torch.randn(2, 3, 32, 32)}, {"x": {0: "batch"}}
    program = trace(module, example, dynamic=axes)
    graph = export_dense(program.exported, example, outputs=[(0, "output")], dynamic=axes)
    finish(graph)
    return graph.to_bytes()


def runner(model: bytes) -> OnnxRuntimeRunner:
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 32, 32), dtype=np.float32)}
    return OnnxRuntimeRunner(model, workload=Workload(1, 1, 1), feeds=feeds)


def classes(model: bytes, test: Images) -> np.ndarray:
    """The class that the graph gives each image, and its label; (images, 2)."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    x, y = test
    found = [session.run(None, {"x": part.numpy()})[0].argmax(1) for part in x.split(BATCH)]
    return np.stack([np.concatenate(found), y.numpy()], axis=1)


def images(path: Path, *, rng: torch.Generator | None = None) -> Images:
    """Images and labels of a file, in random order with `rng`."""
    with np.load(path, allow_pickle=False) as held:
        x = torch.from_numpy(held["x"]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(held["labels"])
        mean, std = (torch.from_numpy(np.array(held[n], np.float32)) for n in ("mean", "std"))
    if rng is not None:
        order = torch.randperm(len(x), generator=rng)[:STATISTICS]
        x, y = x[order], y[order]
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1), y


def score(rows: np.ndarray) -> float:
    return float(accuracy(rows[:, 0], rows[:, 1]))


def difference(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Difference of accuracy in points with its paired bootstrap interval: [value, low, high]."""
    interval = paired_bootstrap(theirs, ours, metric="accuracy", n=RESAMPLES)
    return [round(value, 2) for value in (score(ours) - score(theirs), *(interval or ()))]


def document(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: the runs, and medians over the seeds of each request."""
    summary = []
    names = ("network", "numerics", "asked")
    for key in sorted({tuple(r[n] for n in names) for r in runs}):
        own = [r for r in runs if tuple(r[n] for n in names) == key]
        rivals = {
            n: median(r["rivals"][n]["accuracy"] for r in own) for n in RIVALS if own[0]["rivals"]
        }
        accuracy = median(r["accuracy"] for r in own)
        summary.append(
            {
                **dict(zip(names, key, strict=True)),
                "seeds": len(own),
                "verdicts": [r["verdict"] for r in own],
                "speedup": median(r["speedup"] for r in own),
                "dense": own[0]["dense"],
                "accuracy": accuracy,
                "rivals": rivals,
                "passed": all(r["verdict"] == "validated" for r in own)
                and all(v["ours_minus_theirs"][1] > 0 for r in own for v in r["rivals"].values()),
            }
        )
    return {
        "schema_version": 1,
        "claim": __doc__.splitlines()[0],
        "passed": all(row["passed"] for row in summary),
        "device": device_fingerprint(runtime="onnxruntime"),
        "processors": os.cpu_count(),
        "summary": summary,
        "runs": runs,
    }


def line(run: dict[str, Any]) -> str:
    rivals = ", ".join(f"{n} {r['accuracy']:.2f}" for n, r in run["rivals"].items())
    return (
        f"{run['network']} {run['numerics']} {run['asked']}x seed {run['seed']}: {run['verdict']} "
        f"{run['speedup']:.3f}x, {run['accuracy']:.2f} (dense {run['dense']:.2f}; {rivals}), "
        f"{run['compile_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
