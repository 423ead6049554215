"""What attention and feed-forward sites cost on this GPU at every width, in fp16, with torch.

    python benchmarks/measure_gpu_sites.py [--seconds 120]

Truth to test models of a device against: each site is timed in its surroundings (residual sum and
LayerNorm), as a CUDA graph that walks through copies of the site until their weights no longer
fit the L2 cache, as those of a whole model would not. Compute only: no transfers, no launches from
the host. Results go to benchmarks/results/gpu_sites.json, with raw samples.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from provenance import commit
from torch import Tensor
from torch.nn import functional as F

from zipc.core.files import write_json

RESULTS = Path(__file__).parent / "results" / "gpu_sites.json"
SAMPLES = 15
HEAD = 64
WORKLOADS = ((1, 128), (8, 128), (32, 128), (1, 512))  # batch, sequence
MOST_COPIES = 24


@dataclass(frozen=True)
class Shape:
    """An encoder layer by name: model width, heads of 64 and feed-forward width."""

    name: str
    hidden: int
    heads: int
    ffn: int


SHAPES = (
    Shape("bert-base", 768, 12, 3072),
    Shape("bert-large", 1024, 16, 4096),
    Shape("llama-1b", 2048, 32, 8192),
)


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float16) * 0.02


def attention(shape: Shape, heads: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """Self-attention with `heads` heads, the sum and the normalisation; and its bytes."""
    qkv, out = weights(3 * heads * HEAD, shape.hidden), weights(shape.hidden, heads * HEAD)
    bias, scale = weights(3 * heads * HEAD), weights(shape.hidden)

    def run(x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = F.linear(x, qkv, bias).view(b, s, 3, heads, HEAD).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, heads * HEAD)
        return F.layer_norm(x + F.linear(y, out, scale), (shape.hidden,), scale, scale)

    return run, 2 * (qkv.numel() + out.numel())


def feed_forward(shape: Shape, width: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """Two linear maps around a GELU, the sum and the normalisation; and its bytes."""
    up, down = weights(width, shape.hidden), weights(shape.hidden, width)
    bias, scale = weights(width), weights(shape.hidden)

    def run(x: Tensor) -> Tensor:
        y = F.linear(F.gelu(F.linear(x, up, bias)), down, scale)
        return F.layer_norm(x + y, (shape.hidden,), scale, scale)

    return run, 2 * (up.numel() + down.numel())


def milliseconds(
    make: Callable[[], tuple[Callable[[Tensor], Tensor], int]], x: Tensor, cache_bytes: int
) -> list[float]:
    """Samples of the time of one site, each the mean over one walk through the copies."""
    first, size = make()
    copies = max(2, min(MOST_COPIES, 1 + 2 * cache_bytes // max(size, 1)))
    blocks = [first, *(make()[0] for _ in range(copies - 1))]

    def walk() -> None:
        for block in blocks:
            block(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            walk()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        walk()
    for _ in range(3):
        graph.replay()
    samples = []
    for _ in range(SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / copies)
    return samples


def entries(seconds: float) -> list[dict[str, Any]]:
    """Every site, workload and width, as far as the time goes."""
    found: list[dict[str, Any]] = []
    started = time.monotonic()
    properties = torch.cuda.get_device_properties(0)
    for shape in SHAPES:
        step = max(shape.ffn // 32, 64)
        for batch, sequence in WORKLOADS:
            x = weights(batch, sequence, shape.hidden)
            sites: list[tuple[str, int, Callable[[], Any]]] = [
                ("heads", h, lambda h=h, shape=shape: attention(shape, h))
                for h in range(1, shape.heads + 1)
            ]
            sites += [
                ("ffn", w, lambda w=w, shape=shape: feed_forward(shape, w))
                for w in range(step, shape.ffn + 1, step)
            ]
            for kind, width, make in sites:
                if time.monotonic() - started > seconds:
                    print(f"out of time before {shape.name} {batch}x{sequence} {kind} {width}")
                    return found
                samples = milliseconds(make, x, properties.L2_cache_size)
                found.append(
                    {
                        "shape": shape.name,
                        "batch": batch,
                        "sequence": sequence,
                        "kind": kind,
                        "width": width,
                        "ms": round(median(samples), 6),
                        "samples_ms": [round(s, 6) for s in samples],
                    }
                )
            print(f"{shape.name} {batch}x{sequence}: {len(found)} entries", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        found = entries(arguments.seconds)
    device = torch.cuda.get_device_properties(0)
    write_json(
        arguments.results,
        {
            "commit": commit(),
            "device": device.name,
            "processors": device.multi_processor_count,
            "l2_bytes": device.L2_cache_size,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "numeric": "fp16",
            "layers": {s.name: [s.hidden, s.heads, s.ffn] for s in SHAPES},
            "entries": found,
        },
    )


if __name__ == "__main__":
    main()
