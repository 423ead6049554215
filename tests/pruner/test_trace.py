"""What is told of code that cannot be traced, or whose weights are computed."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from zipc.core.errors import UnsupportedModel
from zipc.pruner.graph.sites import find_sites
from zipc.pruner.graph.trace import trace

PICTURE = {"x": torch.zeros(2, 3, 8, 8)}


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else x


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Branch(), "the code depends on the value of a tensor"),
        (Numpy(), "RuntimeError: .numpy() is not supported for tensor subclasses"),
    ],
)
def test_code_that_cannot_be_traced_is_told_with_its_line(module: nn.Module, reason: str) -> None:
    lines, start = inspect.getsourcelines(type(module).forward)
    with pytest.raises(UnsupportedModel) as refused:
        trace(module, PICTURE, dynamic={})
    told = f"{reason} (test_trace.py, line {start + 1}: {lines[1].strip()}). Rewrite that"
    assert told in str(refused.value)


@pytest.mark.parametrize("how", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_weight_that_torch_parametrizes_is_named_with_how_to_undo_it(how) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), how(nn.Conv2d(8, 6, 3))
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.second(self.first(x).relu()).relu())
            return y

    structure = find_sites(trace(Net().eval(), PICTURE, dynamic={}))
    reasons = {entry.path: entry.reason for entry in structure.left_alone}
    assert "the weight of second comes from a parametrization" in reasons["first"]
    assert "remove_parametrizations(second, 'weight')" in reasons["first"]


class Renamed(nn.Conv2d):
    """A convolution by another name, as EfficientNet's depthwise ones are."""


class Doubled(nn.Conv2d):
    """One that does more than its weights say: nothing can be put in its place."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("kind", "found"), [(Renamed, True), (Doubled, False)])
def test_a_subclass_is_the_map_whose_code_it_runs(kind: type[nn.Conv2d], *, found: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), kind(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x).relu())
            return y

    structure = find_sites(trace(Net().eval(), PICTURE, dynamic={}))
    assert [site.producers for site in structure.sites] == ([("first",)] if found else [])
    reasons = {entry.path: entry.reason for entry in structure.left_alone}
    assert found or "last.weight belongs to a Doubled" in reasons["first"]


def test_a_weight_that_code_computes_is_told_with_its_module() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, 2 * self.weight, self.bias)

    module = nn.Sequential(nn.Linear(6, 8), Scaled(8, 6))
    structure = find_sites(trace(module.eval(), {"input": torch.zeros(2, 6)}, dynamic={}))
    reasons = {entry.path: entry.reason for entry in structure.left_alone}
    assert "the weight that 1 multiplies by is computed from others" in reasons["0"]


def test_a_map_that_reads_nothing_of_the_input_is_computed_when_a_graph_is_loaded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 6))
            self.place, self.read = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(x) @ self.place(2 * self.table).T

    program = trace(Net().eval(), {"x": torch.zeros(2, 6)}, dynamic={"x": {0: "batch"}})
    assert {c.module: c.rounds for c in program.maps} == {"place": False, "read": True}


class Sliced(nn.Module):
    """Takes what a map gives apart by slices that end where `borders` are."""

    def __init__(self, *borders: int) -> None:
        super().__init__()
        self.first, self.borders = nn.Linear(4, 12), (0, *borders)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        ends = zip(self.borders, self.borders[1:], strict=False)
        gate, *parts = (x[..., start:end] for start, end in ends)
        return self.last(torch.stack([gate.tanh() * part for part in parts]).sum(0))


def sites_of(module: nn.Module) -> list[tuple[str, int]]:
    program = trace(module, {"x": torch.randn(2, 3, 4)}, dynamic={"x": {0: "batch"}})
    return [(site.kind, site.units) for site in find_sites(program).sites]


def test_slices_that_leave_nothing_out_are_a_split() -> None:
    assert sites_of(Sliced(4, 8, 12)) == [("ffn", 4)]
    assert sites_of(Sliced(4, 8, 99)) == [("ffn", 4)]  # as Python cuts it, to the end


def test_slices_that_leave_some_out_stay_what_they_are() -> None:
    assert sites_of(Sliced(4, 8)) == []


def test_the_larger_of_two_tensors_is_taken_place_by_place() -> None:
    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.max(self.a(x), torch.min(self.b(x), torch.zeros(()))))

    assert sites_of(Larger()) == [("ffn", 6)]


def test_the_largest_of_all_is_no_such_thing() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            found = self.a(x)
            return self.last(found - found.max())

    assert sites_of(Largest()) == []
