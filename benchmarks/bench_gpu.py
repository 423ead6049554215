"""Where units, INT8 and 2:4 weights pay on this GPU: whole stacks of layers, in plain torch.

    python benchmarks/bench_gpu.py [--seconds 420] [--shapes bert-base,vit-b16] [--batches 1,8,32]

Shapes of BERT-base (128 tokens), ViT-B/16 (197) and a Llama of a billion parameters (reading 128
tokens; without its vocabulary), each with all its units or half its heads and half its feed-forward
width, in fp16 or INT8 (torch._int_mm, static ranges), dense or 2:4 (cuSPARSELt through torch), and
all of these together. Every stack is a CUDA graph; all of a workload take turns, and a speedup is
that over dense fp16, paired, with its 95 % interval. Random weights: kernels do not look at values,
but each variant's outputs are held against floats with the same weights, so that what is timed is
the right product. Compute only: no transfers, no launches from the host.

The attention and feed-forward parts of each stack are timed on their own as well. "predicted" is
the sum of these prices, dense over variant: what a latency table of this GPU would have told.

Where torch lacks a kernel, the result says which and why. --device cpu runs the same in fp32,
without 2:4. Results go to benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_networks import Glue, Part, Shape, Stack, Variant, build
from provenance import commit
from torch import Tensor

from zipc.core.files import write_json
from zipc.profiler.facts import one_line
from zipc.profiler.timing import interleave, warm_up
from zipc.proof import paired_timing

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SHAPES = (
    Shape("bert-base", 12, 768, 12, 12, 3072, 128),
    Shape("vit-b16", 12, 768, 12, 12, 3072, 197),
    Shape("llama-1b", 16, 2048, 32, 8, 8192, 128, gated=True),
)
VARIANTS = tuple(
    Variant(halved, numeric, pattern)
    for pattern, numeric, halved in product(("dense", "2:4"), ("fp16", "int8"), (False, True))
)
ROUNDS = 32, 400
PARTS_ROUNDS = 24
PARTS = "attention", "feed_forward"


@dataclass(frozen=True, slots=True)
class Timed:
    """One call, timed; a `Runner`. A CUDA graph on a GPU."""

    call: Callable[[], object]
    cuda: bool

    def run(self) -> float:
        if not self.cuda:
            started = time.perf_counter_ns()
            self.call()
            return (time.perf_counter_ns() - started) / 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def timed(part: Part, x: Tensor) -> Timed:
    """`part` on `x`, captured as a CUDA graph where there is a GPU."""
    if not x.is_cuda:
        return Timed(lambda: part(x), cuda=False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            part(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part(x)
    return Timed(graph.replay, cuda=True)


def error_of(stack: Stack, x: Tensor) -> float:
    """How far outputs are from those in floats with the same weights, relative to their size."""
    expected = stack.expected.float()
    return float(((stack.run(x).float() - expected).norm() / expected.norm()).item())


def measure(shape: Shape, batch: int, glue: Glue, *, device: str, seconds: float) -> dict[str, Any]:
    """All variants of a workload in turns; `seconds` bounds the timing of whole stacks."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(1)
    size = batch, shape.sequence, shape.hidden
    x = torch.randn(size, device=device, dtype=dtype, generator=generator)
    stacks: dict[Variant, Stack] = {}
    found: dict[str, Any] = {}
    for variant in VARIANTS:
        try:
            stack = build(shape, variant, glue, x)
            found[variant.name] = {"error": error_of(stack, x)}
        except RuntimeError as error:
            found[variant.name] = {"not_run": one_line(error)}
            continue
        stacks[variant] = stack
    wholes = {variant: timed(stack.run, x) for variant, stack in stacks.items()}
    rounds = _as_fit([median(warm_up(whole)) for whole in wholes.values()], seconds)
    samples = dict(zip(wholes, interleave(list(wholes.values()), rounds=rounds), strict=True))
    parts = {variant: _parts(stack, x) for variant, stack in stacks.items()}
    dense = VARIANTS[0]
    for variant, times in samples.items():
        paired = paired_timing(samples[dense], times)
        found[variant.name] |= {
            "ms": median(times),
            "speedup": paired.speedup,
            "speedup_ci95": paired.ci95,
            "parts_ms": dict(zip(PARTS, parts[variant], strict=True)),
            "predicted": sum(parts[dense]) / sum(parts[variant]),
            "samples_ms": [round(ms, 5) for ms in times],
        }
    return {"shape": shape.name, "batch": batch, "sequence": shape.sequence, "variants": found}


def _parts(stack: Stack, x: Tensor) -> tuple[float, float]:
    """Milliseconds of all attention and of all feed-forward parts."""
    runners = [timed(stack.alone(kind), x) for kind in range(len(PARTS))]
    for runner in runners:
        warm_up(runner)
    attention, feed_forward = interleave(runners, rounds=PARTS_ROUNDS)
    return median(attention), median(feed_forward)


def _as_fit(ms: Sequence[float], seconds: float) -> int:
    """Rounds, each of two runs of everything."""
    least, most = ROUNDS
    return max(least, min(most, int(seconds * 1000 / (2 * sum(ms)))))


def glue_of(device: str) -> tuple[Glue, str]:
    """Fused glue where the compiler of torch works, and which it is."""
    if device != "cuda":
        return Glue(), "eager"
    fused = Glue().fused()
    try:
        fused.gelu(torch.zeros(2, 2, device=device))
    except Exception as error:  # those of compilers share no base
        return Glue(), f"eager: {one_line(error)}"
    return fused, "fused by torch.compile"


def told(workload: dict[str, Any]) -> str:
    """A workload in lines."""
    lines = [f"{workload['shape']}, batch {workload['batch']}"]
    for name, variant in workload["variants"].items():
        if "not_run" in variant:
            lines.append(f"  {name}: not run: {variant['not_run']}")
            continue
        low, high = variant["speedup_ci95"]
        lines.append(
            f"  {name}: {variant['ms']:.3f} ms, {variant['speedup']:.2f}x [{low:.2f}, {high:.2f}], "
            f"predicted {variant['predicted']:.2f}x, error {variant['error']:.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", default=",".join(s.name for s in SHAPES))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=420.0, help="after which none is begun")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no NVIDIA GPU here; --device cpu shows that this runs.")
    device = arguments.device
    shapes = [s for s in SHAPES if s.name in arguments.shapes.split(",")]
    work = list(product(shapes, [int(b) for b in arguments.batches.split(",")]))
    if not work:
        parser.error(f"There are no such shapes; there are {', '.join(s.name for s in SHAPES)}.")
    glue, fused = glue_of(device)
    started = time.monotonic()
    found: list[dict[str, Any]] = []
    left: list[str] = []
    with torch.inference_mode():
        for shape, batch in work:
            if time.monotonic() - started > arguments.seconds:
                left.append(f"{shape.name}, batch {batch}")
                continue
            share = 0.3 * arguments.seconds / len(work)
            found.append(measure(shape, batch, glue, device=device, seconds=share))
            print(told(found[-1]), flush=True)
            write_json(arguments.out, _result(found, left, device=device, glue=fused))
    write_json(arguments.out, _result(found, left, device=device, glue=fused))


def _result(
    found: Sequence[dict[str, Any]], left: Sequence[str], *, device: str, glue: str
) -> dict[str, Any]:
    name = torch.cuda.get_device_name(0) if device == "cuda" else "cpu"
    return {
        "schema_version": 1,
        "commit": commit(),
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "glue": glue,
        "workloads": list(found),
        "out_of_time": list(left),
    }


if __name__ == "__main__":
    main()
