"""Which of the ways to bring a finished network to INT8 is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.zipc.test_integer_body import NETS
from zipc.build import Built, build_floats, edit_of
from zipc.core.errors import ExportMismatch
from zipc.core.request import Request
from zipc.core.types import Allocation, Level, Silent, Workload
from zipc.exporters.specialise import Edit
from zipc.integer_body import IntegerBody
from zipc.integer_choice import network_in_integers
from zipc.model_source import load_source, settle
from zipc.prepare import Prepared, prepare
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.pruner.evidence import collect
from zipc.pruner.graph.sites import sizes_at
from zipc.pruner.levels import Levels
from zipc.pruner.maps import matrices
from zipc.pruner.on_grid import on_grid
from zipc.pruner.states import States
from zipc.stage_cache import StageCache

IMAGES = np.random.default_rng(0).standard_normal((64, 3, 16, 16), dtype=np.float32)
WORKLOAD = Workload(1, None)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "nets.py").write_text(NETS)
    source = load_source(f"{folder / 'nets.py'}:net")
    request = settle(Request(model=f"{folder / 'nets.py'}:net"), source)
    return prepare(source, request, cache=StageCache(folder / "cache"), progress=Silent())


@pytest.fixture(scope="module")
def body(prepared: Prepared) -> IntegerBody:
    made = IntegerBody(WORKLOAD, row_bytes=prepared.dense.row_bytes())
    return made.calibrated_on([{"x": IMAGES[:32]}])


def outputs(model: bytes) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = OnnxRuntimeRunner(
        model, workload=WORKLOAD, feeds={"x": IMAGES}
    ).outputs({"x": IMAGES})["output"]
    return found


def chosen(
    prepared: Prepared, body: IntegerBody, fast_enough: Callable[[bytes], bool], cut: int = 0
) -> tuple[Built, list[str]]:
    """What is taken where the oracle is the distance from the floats."""
    levels = {n: Level(s.units) for n, s in prepared.sites.items()}
    floats = build_floats(prepared, Allocation(levels, 0.0, 0.0), States(), workload=WORKLOAD)
    name, site = next(iter(prepared.sites.items()))
    floats.allocation.levels[name] = Level(site.units - cut)
    dense = outputs(floats.model)

    def judge(run: Callable[[dict[str, Tensor]], list[Tensor]]) -> float:
        return float(np.square(run({"x": torch.from_numpy(IMAGES)})[0].numpy() - dense).sum())

    candidates = SimpleNamespace(confirm=SimpleNamespace(judge=judge), notes=[])
    built = network_in_integers(
        prepared,
        body,
        candidates,  # type: ignore[arg-type]
        floats,
        workload=WORKLOAD,
        fast_enough=fast_enough,
        progress=Silent(),
    )
    return built, candidates.notes


def sums_of_floats(model: bytes) -> int:
    graph = onnx.load_from_string(model).graph
    made = {name: n.op_type for n in graph.node for name in n.output}
    sums = [n for n in graph.node if n.op_type in ("Add", "Sum")]
    return sum(any(made[name] != "DequantizeLinear" for name in n.input) for n in sums)


def test_exact_sums_are_taken_where_they_are_fast_enough(
    prepared: Prepared, body: IntegerBody
) -> None:
    exact, told = chosen(prepared, body, lambda _: True)
    rounded, told_too = chosen(prepared, body, lambda _: False)
    assert sums_of_floats(exact.model) == 2
    assert sums_of_floats(rounded.model) == 0
    assert told[-1] == "INT8 with exact sums: taken"
    assert told_too[-1] == "INT8 with exact sums: too slow"


def test_a_network_that_was_pruned_for_speed_gives_none_back(
    prepared: Prepared, body: IntegerBody
) -> None:
    def never(_: bytes) -> bool:
        raise AssertionError("no exact sums are tried")

    built, _ = chosen(prepared, body, never, cut=1)
    assert sums_of_floats(built.model) == 0


def test_where_exact_sums_are_not_possible_rounded_ones_stay(
    prepared: Prepared, body: IntegerBody, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit = IntegerBody.emit

    def emit_rounded(self: IntegerBody, model: bytes, *, part: bool = False) -> bytes:
        if self.exact_sums:
            raise ExportMismatch("No product is left.")
        return emit(self, model, part=part)

    monkeypatch.setattr(IntegerBody, "emit", emit_rounded)
    built, told = chosen(prepared, body, lambda _: True)
    assert sums_of_floats(built.model) == 0
    assert told[-1].endswith(", exact sums are not possible: No product is left.")


def test_exact_sums_lose_less_and_only_the_first_convolution_its_integers(
    prepared: Prepared, body: IntegerBody
) -> None:
    dense = prepared.specialise(prepared.dense, Edit()).to_bytes()
    rounded, exact = (m.emit(dense) for m in (body, replace(body, exact_sums=True)))
    onnx.checker.check_model(exact)
    error, smaller = (np.linalg.norm(outputs(m) - outputs(dense)) for m in (rounded, exact))
    assert smaller < error
    products = prepared.runtime.narrow_products
    assert products(exact)["int8"] == products(rounded)["int8"] - 1


def test_the_result_of_the_network_is_not_rounded(prepared: Prepared, body: IntegerBody) -> None:
    dense = prepared.specialise(prepared.dense, Edit()).to_bytes()
    assert len(np.unique(outputs(body.emit(dense)))) > 256


@pytest.mark.parametrize("reduce_range", [False, True])
def test_weights_rounded_with_feedback_are_not_rounded_again(
    prepared: Prepared, body: IntegerBody, reduce_range: bool
) -> None:
    body = replace(body, reduce_range=reduce_range)
    modules = [m for site in prepared.structure.sites for m in site.maps]
    rows = [{"x": torch.from_numpy(IMAGES[:8])}]
    stats = collect(prepared.executor, rows, modules=modules)
    levels = Levels(prepared.sites, prepared.calls, prepared.weights, stats, {})
    allocation = Allocation({n: Level(s.units) for n, s in prepared.sites.items()}, 0.0, 0.0)
    plain = levels.states(allocation)
    made = on_grid(levels, allocation, plain, limit=body.weight_limit)
    convolutions = [m for m in plain.maps if prepared.calls[m].convolution]
    assert len(convolutions) == 5
    weights = {}
    for module in convolutions:
        call, gram = prepared.calls[module], stats[module].gram[0].double()
        before, after = (matrices(call, s.maps[module].weight)[0].double() for s in (plain, made))
        scale = before.abs().amax(1, keepdim=True) / body.weight_limit
        nearest = (before / scale).round() * scale

        def lost(other: Tensor, W: Tensor = before, G: Tensor = gram) -> float:
            return float((((W - other) @ G) * (W - other)).sum())

        assert lost(after) < lost(nearest)
        weights[module] = (after / scale).round().flatten().tolist()
    integers = [
        onnx.numpy_helper.to_array(t).flatten().tolist()
        for t in onnx.load_from_string(emitted(prepared, body, made)).graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4
    ]
    assert sorted(integers) == sorted(weights.values())


def emitted(prepared: Prepared, body: IntegerBody, states: States) -> bytes:
    edit = edit_of(
        states, sizes_at(prepared.structure, {n: s.units for n, s in prepared.sites.items()})
    )
    return body.emit(prepared.specialise(prepared.dense, edit).to_bytes())
