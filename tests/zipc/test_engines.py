"""Engines of a board, read back: what they pass over is not counted on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.zipc.test_closed_loop import fresh_loop, look
from zipc import closed_loop
from zipc.build import Built
from zipc.core.errors import EngineFailed
from zipc.core.types import Allocation, Level, Site
from zipc.engines import engine_of, passed_over
from zipc.profiler.remote import EngineRunner
from zipc.pruner.states import MapState, States
from zipc.shipped import Shipped

PLACES = {"mm_0": "linear of first", "mm_1": "linear_1 of second"}
SITES = [Site(n, "ffn", 8, (), (), (n,), n) for n in ("first", "second")]


class Told(EngineRunner):
    """An engine that says what its products compute in."""

    def __init__(self, datatype: str, tactics: tuple[str, str]) -> None:
        self.said = [
            {
                "Name": f"mm_{i}",
                "Inputs": [{"Format/Datatype": datatype}],
                "TacticName": tactic,
                "Metadata": f"[ONNX Layer: mm_{i}]",
            }
            for i, tactic in enumerate(tactics)
        ]

    def __del__(self) -> None:
        pass

    def layers(self) -> str:
        return json.dumps({"Layers": self.said})


def shipped() -> Shipped:
    """Two products in fp16."""
    half, weight = TensorProto.FLOAT16, np.ones((8, 8), np.float16)
    ends = [helper.make_tensor_value_info(n, half, [1, 8]) for n in ("x", "y")]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="mm_0"),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="mm_1"),
    ]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    return Shipped(model.SerializeToString(), b"", PLACES)


def built(*patterns: Any) -> Built:
    weight = torch.zeros(8, 8)
    maps = {s.name: MapState(weight, None, pattern=p) for s, p in zip(SITES, patterns, strict=True)}
    levels = {s.name: Level(8, pattern=p) for s, p in zip(SITES, patterns, strict=True)}
    return Built(Allocation(levels, 1.0, 0.0), States(maps), b"", 0.0, 0, 2)


def test_sites_without_sparse_kernels_are_found() -> None:
    runner = Told("Half", ("sm80_xmma_sparse_gemm_f16f16", "sm80_xmma_gemm_f16f16"))
    engine = engine_of(runner, shipped())
    assert engine is not None
    assert engine.sparse == {"mm_0"}
    for patterns, expected in (
        (("2:4", "2:4"), ["second"]),
        (("2:4", "dense"), []),
        (("dense", "2:4"), ["second"]),
    ):
        assert passed_over(engine, built(*patterns), shipped(), SITES) == expected


def test_an_engine_in_more_bits_than_its_graph_is_refused() -> None:
    with pytest.raises(EngineFailed, match=r"lost precision.*'mm_0', linear of first, in fp32"):
        engine_of(Told("Float", ("a", "b")), shipped())


def test_the_search_goes_on_without_what_an_engine_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first artifact is as fast as asked, but counts on kernels that are not in it."""
    loop = fresh_loop()
    state = type("State", (), {"trials": 1})()
    monkeypatch.setattr(
        closed_loop, "choose", lambda *_, **__: ([(Allocation({}, 1.0, 0.0), 0.0)], state)
    )

    def attempt(_: Allocation, __: float, **___: float) -> Any:
        found = look(speedup=2.06)
        found.repriced = not loop.attempts
        loop.attempts.append(found)
        return found

    monkeypatch.setattr(loop, "attempt", attempt)
    loop.run(2.0)
    assert [a.repriced for a in loop.attempts] == [True, False]
