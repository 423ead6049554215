"""Maps as matrices: what torch computes is rows of the input times the matrix of each group."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from zipc.pruner.graph.trace import MapCall, trace
from zipc.pruner.maps import (
    bias_of_rows,
    input_rows,
    matrices,
    output_rows,
    own_layout,
    row_count,
)

EXACT = 1e-10


def call_of(module: nn.Module, x: Tensor) -> MapCall:
    """The map that a trace finds in a module that is one."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = module

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.map(x)
            return y

    (call,) = trace(One().eval(), {"x": x}, dynamic={}).maps
    return call


def everything(call: MapCall, x: Tensor) -> Tensor:
    return torch.arange(row_count(call, x))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    for i, value in enumerate(module.parameters()):
        value.requires_grad_(False)
        value.data = drawn(*value.shape, seed=i + 1)
    return module.double()


def product(call: MapCall, module: nn.Module, rows: Tensor) -> Tensor:
    """Rows of the input through the matrices: (rows, groups x out)."""
    parts = rows.chunk(call.groups, dim=1)
    made = [part @ W.T for part, W in zip(parts, matrices(call, module.weight), strict=True)]
    return torch.cat(made, dim=1)


LINEAR: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 3),
    "without bias": lambda: nn.Linear(5, 3, bias=False),
    "gpt2": lambda: transformers.pytorch_utils.Conv1D(3, 5),
}
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (9, 8)),
    "one by one": (lambda: nn.Conv2d(4, 6, 1, bias=False), (5, 5)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (9, 8)),
    "uneven": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 3), padding=(2, 0), dilation=(2, 1)),
        (9, 8),
    ),
    "stride beyond the kernel": (lambda: nn.Conv2d(4, 6, 2, stride=3), (9, 8)),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (7, 6)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (7, 6)),
    "multiplied": (lambda: nn.Conv2d(4, 8, 3, stride=2, groups=4), (7, 6)),
    "1-D": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2, dilation=1), (11,)),
    "1-D grouped": (lambda: nn.Conv1d(4, 6, 3, dilation=3, padding=3, groups=2), (11,)),
    "3-D": (lambda: nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 1)), (5, 6, 4)),
}
TRANSPOSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "doubling": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (5, 4)),
    "overlapping": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (5, 4)),
    "grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (5, 4)),
    "1-D": (lambda: nn.ConvTranspose1d(4, 3, 4, stride=2, padding=1), (7,)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_maps_are_rows_times_a_matrix(name: str) -> None:
    module, x = randomised(LINEAR[name]()), drawn(2, 7, 5)
    call = call_of(module, x)
    y = module(x)
    pick = torch.tensor([3, 0, 13, 3])
    assert row_count(call, x) == 14
    rows = input_rows(call, x, pick)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(product(call, module, rows) + bias, output_rows(call, y, pick))
    torch.testing.assert_close(output_rows(call, y, pick)[1], y[0, 0])
    assert matrices(call, module.weight).shape == (1, 3, 5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_patches_times_a_matrix_per_group(name: str) -> None:
    make, size = CONVOLUTIONS[name]
    module, x = randomised(make()), drawn(2, 4, *size)
    call = call_of(module, x)
    y = module(x)
    assert row_count(call, x) == y[:, 0].numel()
    for pick in (everything(call, x), torch.tensor([5, 1, 5])):
        rows = input_rows(call, x, pick)
        bias = 0 if module.bias is None else module.bias
        want = output_rows(call, y, pick)
        torch.testing.assert_close(product(call, module, rows) + bias, want, atol=EXACT, rtol=0)
    places = itertools.product(range(2), *map(range, y.shape[2:]))
    for row, (b, *place) in zip(output_rows(call, y, everything(call, x)), places, strict=True):
        assert torch.equal(row, y[(b, slice(None), *place)])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_patches_of_any_convolution(data: Any) -> None:
    axes = data.draw(st.integers(1, 2))
    groups = data.draw(st.integers(1, 3))
    draws = [
        [data.draw(st.integers(low, high)) for _ in range(axes)]
        for low, high in ((1, 3), (1, 3), (0, 3), (1, 3))
    ]
    kernel, stride, padding, dilation = draws
    size = [
        d * (k - 1) + 1 + data.draw(st.integers(0, 4))
        for k, d in zip(kernel, dilation, strict=True)
    ]
    weight = drawn(2 * groups, 2, *kernel)
    x = drawn(2, 2 * groups, *size, seed=1)
    y = (F.conv1d if axes == 1 else F.conv2d)(x, weight, None, stride, padding, dilation, groups)
    call = MapCall(
        "node",
        "map",
        "map.weight",
        None,
        "x",
        kernel=weight[0, 0].numel(),
        groups=groups,
        convolution=True,
        window=tuple(zip(kernel, stride, padding, dilation, strict=True)),
    )
    pick = everything(call, x)
    parts = input_rows(call, x, pick).chunk(groups, dim=1)
    got = [part @ W.T for part, W in zip(parts, matrices(call, weight), strict=True)]
    torch.testing.assert_close(torch.cat(got, 1), output_rows(call, y, pick), atol=EXACT, rtol=0)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_spread_every_input_over_their_taps(name: str) -> None:
    make, size = TRANSPOSED[name]
    module, x = randomised(make()), drawn(2, 4, *size)
    call = call_of(module, x)
    assert row_count(call, x) == 2 * x[0, 0].numel()
    rows = input_rows(call, x, everything(call, x))
    taps = list(module.kernel_size)
    cells = (
        product(call, module, rows).view(2, x[0, 0].numel(), -1).transpose(1, 2)
    )  # (batch, out x taps, positions)
    y = module(x)
    extra = [1] * (2 - len(size))
    want = F.fold(
        cells,
        output_size=[*extra, *y.shape[2:]],
        kernel_size=[*extra, *taps],
        stride=[*extra, *module.stride],
        padding=[*[0] * len(extra), *module.padding],
    ).view(y.shape)
    bias = module.bias.view(-1, *[1] * len(size))
    torch.testing.assert_close(want + bias, y, atol=EXACT, rtol=0)


@pytest.mark.parametrize("name", [*LINEAR, *CONVOLUTIONS, *(f"transposed {n}" for n in TRANSPOSED)])
def test_a_weight_comes_back_from_its_matrices(name: str) -> None:
    if name in LINEAR:
        module, x = LINEAR[name](), drawn(2, 7, 5)
    else:
        kind = TRANSPOSED if name.startswith("transposed ") else CONVOLUTIONS
        make, size = kind[name.removeprefix("transposed ")]
        module, x = make(), drawn(2, 4, *size)
    randomised(module)
    call = call_of(module, x)
    made = matrices(call, module.weight)
    assert made.shape[0] == call.groups
    assert made.numel() == module.weight.numel()
    back = own_layout(call, made, module.weight)
    assert back.is_contiguous()
    assert torch.equal(back, module.weight)


@pytest.mark.parametrize("name", ["plain", "grouped", "depthwise", "1-D grouped", "3-D"])
def test_fewer_columns_are_fewer_input_channels(name: str) -> None:
    """A refitted matrix is narrower than the weight it came from; the taps stay."""
    make, size = CONVOLUTIONS[name]
    module = randomised(make())
    call = call_of(module, drawn(2, 4, *size))
    taps = call.kernel
    channels = module.weight.shape[1]
    kept = list(range(0, channels, 2))
    columns = [c * taps + j for c in kept for j in range(taps)]
    back = own_layout(call, matrices(call, module.weight)[:, :, columns], module.weight)
    assert torch.equal(back, module.weight[:, kept])


def test_a_shift_of_rows_is_a_bias_and_taps_share_one() -> None:
    grouped = randomised(nn.Conv2d(4, 6, 3, groups=2))
    call = call_of(grouped, drawn(1, 4, 5, 5))
    shift = torch.arange(6.0).view(2, 3)
    assert torch.equal(bias_of_rows(call, shift, grouped.weight), torch.arange(6.0))
    transposed = randomised(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2))
    call = call_of(transposed, drawn(1, 4, 5, 5))
    shift = torch.arange(24.0).view(2, 12)  # three outputs of four taps in each group
    assert torch.equal(
        bias_of_rows(call, shift, transposed.weight), torch.arange(24.0).view(6, 4).mean(1)
    )
