"""Graphs in torch: every family as in ONNX Runtime, every operator as ONNX itself says."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from onnx.backend.test.loader import load_model_tests

from tests.three_ways import edit_of, other_feeds, random_kept, run_onnx, single
from tests.zoo import ZOO
from zipc.core.errors import ExportMismatch
from zipc.core.types import Workload
from zipc.exporters.specialise import specialise
from zipc.profiler.runners.torch import TorchRunner
from zipc.profiler.runners.torch_graph import TorchGraph
from zipc.profiler.runners.torch_operators import OPERATORS
from zipc.runtimes import RUNTIMES

GAP = 2e-5
FAMILIES = (
    *("bert", "llama", "mixtral", "t5", "swin", "convnext", "mobilenet-v3", "googlenet"),
    *("unet", "unet-upsample", "yolo", "shufflenet", "mobilevit", "groupnorm"),
)
UNTYPED = ("UInt16", "UInt32", "UInt64", "np.ndarray of type")  # torch has no arithmetic for them
TIES = "same_values"  # either of equals is right
FEWEST = 850  # of ONNX's own cases that must come out right


@pytest.mark.parametrize("name", FAMILIES)
def test_families_compute_what_they_do_in_onnx_runtime(name: str) -> None:
    made, dense = single(name)
    graph = specialise(
        dense, edit_of(made, random_kept(made, 0)), emitter=RUNTIMES["torch"].emitter
    )
    inside = TorchGraph(graph.to_bytes(), device="cpu", threads=1)
    for feeds in (made.example, other_feeds(ZOO[name], torch.float32), made.example):
        want = [value.numpy() for value in run_onnx(made, graph, feeds)]
        given = {v.name: feeds[v.name].numpy() for v in inside.get_inputs()}
        inside.run(None, given)
        found = inside.run([f"result_{i}" for i in range(len(want))], given)
        for got, expected in zip(found, want, strict=True):
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert np.linalg.norm(got - expected) < GAP * np.linalg.norm(expected)


def test_operators_do_what_onnx_says_or_are_refused() -> None:
    """No case of ONNX's own may come out wrong; most come out."""
    right, wrong = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = load_model_tests(kind="node")
    for case in cases:
        model = case.model
        known = all(n.op_type in OPERATORS and not n.domain for n in model.graph.node)
        if not known or TIES in case.name:
            continue
        for inputs, outputs in case.data_sets:
            try:
                graph = TorchGraph(model.SerializeToString(), device="cpu", threads=1)
                given = {i.name: v for i, v in zip(model.graph.input, inputs, strict=False)}
                found = graph.run([o.name for o in model.graph.output], given)
            except Exception:  # refused: what a runner then says is tested below
                continue
            close = all(_close(a, b) for a, b in zip(found, outputs, strict=True))
            right, wrong = right + close, wrong + [case.name] * (not close)
    assert not wrong
    assert right >= FEWEST


def _close(got: np.ndarray, want: np.ndarray) -> bool:
    if (got.dtype, got.shape) != (want.dtype, want.shape):
        return False
    wide = 2e-3 if got.dtype == np.float16 else 1e-4
    return np.allclose(
        *(v.astype(np.float64) for v in (got, want)), rtol=wide, atol=wide, equal_nan=True
    )


def graph_of(*nodes: tuple[str, list[str], list[str], dict[str, object]]) -> bytes:
    """A graph from x (batch, 4) to y."""
    sizes = {"x": ["batch", 4], "y": None}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in sizes.items()]
    made = [helper.make_node(op, reads, makes, **given) for op, reads, makes, given in nodes]
    graph = helper.make_graph(made, "graph", values[:1], values[1:])
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (graph_of(("Det", ["x"], ["y"], {})), "does not run Det in torch"),
        (graph_of(("ArgMax", ["x"], ["y"], {"select_last_index": 1})), "by select_last_index"),
        (graph_of(("LayerNormalization", ["x", "x"], ["y", "m"], {})), "with 2 outputs"),
    ],
)
def test_what_torch_is_not_told_is_refused(model: bytes, told: str) -> None:
    with pytest.raises(ExportMismatch, match=told):
        TorchRunner(model, workload=Workload(2)).run()


def test_sizes_are_worked_out_once_and_anew_for_others() -> None:
    model = graph_of(
        ("Shape", ["x"], ["sizes"], {}),
        ("ReduceProd", ["sizes"], ["count"], {"keepdims": 1}),
        ("Reshape", ["x", "count"], ["flat"], {}),
        ("Relu", ["flat"], ["y"], {}),
    )
    graph = TorchGraph(model, device="cpu", threads=1)
    for batch in (1, 3, 1):
        x = np.arange(-4.0, 4.0 * batch - 4, dtype=np.float32).reshape(batch, 4)
        (y,) = graph.run(["y"], {"x": x})
        assert np.array_equal(y, np.maximum(x, 0).reshape(-1))
    assert sorted(len(plan.steps) for plan in graph._plans.values()) == [2, 2]


def test_threads_are_those_asked_for_and_given_back() -> None:
    threads = torch.get_num_threads()
    model = graph_of(("Relu", ["x"], ["y"], {}))
    TorchGraph(model, device="cpu", threads=threads + 1).run(["y"], {"x": np.ones((1, 4), "f")})
    assert torch.get_num_threads() == threads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("name", ["bert", "llama", "cifar-resnet20"])
def test_a_gpu_computes_the_same_and_replays_a_graph(name: str) -> None:
    made, dense = single(name)
    graph = specialise(dense, edit_of(made, random_kept(made, 0)))
    given = {n: v.numpy() for n, v in made.example.items()}
    (got,), (want,) = (
        TorchGraph(graph.to_bytes(), device=d, threads=0).run(["result_0"], given)
        for d in ("cuda", "cpu")
    )
    assert np.linalg.norm(got - want) < 1e-2 * np.linalg.norm(want)
    timed = TorchGraph(graph.to_bytes(), device="cuda", threads=0)
    timed.run(None, given)
    timed.run(None, given)
    assert len(timed._replays) == 1
