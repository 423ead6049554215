"""bf16: the numeric "bf16" of linear maps under OpenVINO on processors that multiply it.

A bf16 is a float32 without its lower 16 bits (8 bits of precision), so that nothing is calibrated
and nothing overflows. Inputs and weights are rounded, products are summed in fp32 and rounded once;
a bias is added in fp32. Weights and products are rounded to the nearest, with a relative error of
2^-8 at most; inputs as OpenVINO 2026.4 does, which leaves a value that should be rounded up as it
is where its last bit is even: up to twice that, and a little too small on average. Processors with
AVX512-BF16 or AMX do twice as many such products as fp32 ones.

OpenVINO would run a whole network so where it is left alone. Here it is a level like any other: the
graph says which products are in bf16, by Cast before and after, and OpenVINO runs these and no
others on its bf16 kernels though it is asked for fp32. MiniLM with 128 tokens, one thread: fp32
14.4 ms, all linear maps in bf16 9.3 ms; OpenVINO's own choice, which also keeps attention and what
lies between in bf16, 8.4 ms. ONNX Runtime has no such kernels on a processor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BF16 = "bf16"


def rounded(x: Tensor) -> Tensor:
    """x rounded to the nearest bf16, in the type it has."""
    return x.to(torch.bfloat16).to(x.dtype)


def converted(x: Tensor) -> Tensor:
    """x rounded to bf16 as OpenVINO converts fp32 values on a processor."""
    bits = x.to(torch.float32).view(torch.int32)
    up = (bits & 0x10000) >> 1  # half a step, where the last bit is odd
    return ((bits + up) & -0x10000).view(torch.float32).to(x.dtype)


class Bf16Linear(nn.Module):
    """A linear map that computes what the bf16 kernels compute, in floats; its weight is bf16."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        blank = torch.zeros(out_features, in_features, dtype=torch.bfloat16)
        self.register_buffer("weight", blank)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        product = rounded(nn.functional.linear(converted(x), self.weight.to(x.dtype)))
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"
