"""The stacks that are timed on GPUs compute what they should, where this processor can run them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks

sys.path.append(str(Path(benchmarks.__path__[0])))  # its scripts find each other as when run
import bench_gpu
import gpu_networks
from gpu_networks import Glue, Shape, Variant

PLAIN = Shape("plain", 2, 128, 4, 4, 256, 24)
GATED = Shape("gated", 2, 128, 4, 2, 256, 24, gated=True)


def inputs(shape: Shape) -> torch.Tensor:
    return torch.randn(2, shape.sequence, shape.hidden, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [PLAIN, GATED], ids=lambda s: s.name)
@pytest.mark.parametrize("halved", [False, True])
def test_stacks_compute_what_floats_do(shape: Shape, halved: bool) -> None:
    x = inputs(shape)
    with torch.inference_mode():
        floats = gpu_networks.build(shape, Variant(halved, "fp16", "dense"), Glue(), x)
        integers = gpu_networks.build(shape, Variant(halved, "int8", "dense"), Glue(), x)
        assert bench_gpu.error_of(floats, x) < 1e-5
        assert 1e-4 < bench_gpu.error_of(integers, x) < 0.05
        assert torch.equal(floats.expected, integers.expected)


def test_halving_takes_half_the_heads_and_half_the_width() -> None:
    layers = gpu_networks.random_layers(GATED.halved(), "cpu", torch.float32)
    sizes = {name: tuple(held.weight.shape) for name, held in layers[0].items()}
    assert sizes == {"qkv": (256, 128), "out": (128, 128), "up": (256, 128), "down": (128, 128)}


def test_a_workload_is_told_with_what_could_not_run() -> None:
    with torch.inference_mode():
        found = bench_gpu.measure(PLAIN, 2, Glue(), device="cpu", seconds=0.1)
    ran = {name for name, variant in found["variants"].items() if "speedup" in variant}
    assert ran == {v.name for v in bench_gpu.VARIANTS if v.pattern == "dense"}
    dense = found["variants"]["all units, fp16, dense"]
    assert dense["speedup"] == dense["predicted"] == 1.0
    assert len(dense["samples_ms"]) >= bench_gpu.ROUNDS[0]
    for name, variant in found["variants"].items():
        assert (name in ran) != bool(variant.get("not_run"))
    assert "not run: " in bench_gpu.told(found)


@pytest.mark.parametrize("numeric", ["fp16", "int8"])
def test_sparse_products_have_the_right_layout(
    numeric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def product(  # as torch documents cuSPARSELt's
        packed: torch.Tensor,
        dense: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
    ) -> torch.Tensor:
        assert dense.shape[1] % (32 if packed.dtype == torch.int8 else 8) == 0
        found = packed.float() @ dense.float()
        found = found if alpha is None else found * alpha[:, None]
        found = (found if bias is None else found + bias[:, None]).to(out_dtype or dense.dtype)
        return found.t() if transpose_result else found

    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    x = inputs(replace(PLAIN, sequence=25))
    with torch.inference_mode():
        sparse = gpu_networks.build(
            replace(PLAIN, sequence=25), Variant(False, numeric, "2:4"), Glue(), x
        )
        assert bench_gpu.error_of(sparse, x) < (1e-5 if numeric == "fp16" else 0.05)
