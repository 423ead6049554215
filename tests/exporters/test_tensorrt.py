"""Graphs for TensorRT: fp16 that does not overflow, and INT8 that equals its simulation."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import NodeProto, helper
from torch import Tensor, nn

from tests.zoo import ZOO
from zipc.core.engine_options import EngineOptions
from zipc.core.errors import EngineFailed, ExportMismatch, UsageError
from zipc.core.types import Workload
from zipc.exporters.graph import OnnxGraph, attribute
from zipc.exporters.onnx_export import check_parity, export_dense
from zipc.exporters.origin import places
from zipc.exporters.specialise import Edit, Int8Weights
from zipc.exporters.tensorrt.emit import emit
from zipc.exporters.tensorrt.engine import COMPUTE_CAPABILITIES, build_engine
from zipc.exporters.tensorrt.half import kept_in_fp32
from zipc.exporters.tensorrt.maxima import maxima
from zipc.numerics.int8 import (
    ActivationRange,
    activation_range,
    fake_quantize_static,
    quantize_weight,
    symmetric,
)
from zipc.pruner.graph.trace import trace

IN_HALF = 2e-2
LIMITS = {"sequence": 32, "target": 32, "batch": 64}
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"
)


def exported(
    module: nn.Module, example: dict[str, Tensor], dynamic: Mapping[str, Mapping[int, str]]
) -> OnnxGraph:
    program = trace(module, example, dynamic=dynamic, limits=LIMITS)
    return export_dense(program.exported, example, outputs=[(0, "result")], dynamic=dynamic)


@functools.cache
def made(family: str) -> tuple[nn.Module, OnnxGraph]:
    member = ZOO[family]
    module = member.build()
    return module, exported(module, member.example(), member.dynamic)


def run(graph: OnnxGraph, feeds: Mapping[str, Tensor], *more: str) -> list[np.ndarray]:
    """The result, and the values of that name inside the graph."""
    proto = graph.to_proto()
    for name in more:
        proto.graph.output.append(helper.make_tensor_value_info(name, graph.types[name], None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps all Casts
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {i.name: feeds[i.name].numpy() for i in session.get_inputs()})


def first(result: object) -> np.ndarray:
    value = result if isinstance(result, Tensor) else result[0]  # type: ignore[index]
    return value.numpy()


def nodes(graph: OnnxGraph, *operators: str) -> list[NodeProto]:
    return [n for n in graph.to_proto().graph.node if n.op_type in operators]


@needs_rtx
@pytest.mark.parametrize("capability", COMPUTE_CAPABILITIES[1:])
def test_tensorrt_builds_for_other_gpus(capability: str) -> None:
    for family in ("bert", "cifar-resnet8"):
        graph = emit(made(family)[1], Edit(), maxima={})
        workload = shapes_of(family)
        built = build_engine(
            graph.to_bytes(), builder="rtx", compute_capability=capability, workload=workload
        )
        assert "not read back" in str(built)


@needs_rtx
def test_the_level_of_an_engine_is_for_every_builder_and_the_rest_is_not() -> None:
    build = functools.partial(
        build_engine,
        emit(made("bert")[1], Edit(), maxima={}).to_bytes(),
        builder="rtx",
        compute_capability="sm80",
        workload=shapes_of("bert"),
    )
    assert build(options=EngineOptions(level=1)).plan
    for options in (EngineOptions(refit=True), EngineOptions(version_compatible=True)):
        with pytest.raises(UsageError, match=r"TensorRT-RTX builds no .*OUT/build\.sh"):
            build(options=options)


def shapes_of(family: str) -> Workload:
    shapes = {name: tuple(t.shape) for name, t in ZOO[family].example().items()}
    return Workload(sequence_length=None, input_shapes=shapes)


# --- values that fp16 does not hold ------------------------------------------------------------


class Tall(nn.Module):
    """A residual stream that grows beyond fp16 before it is normalised."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(x + self.up(x) * 1e5))


def test_values_beyond_fp16_stay_in_fp32_and_are_listed() -> None:
    module, feeds = Tall().eval().requires_grad_(False), {"x": torch.randn(2, 8)}
    dense = exported(module, feeds, {"x": {0: "batch"}})
    batch = {n: t.numpy() for n, t in feeds.items()}
    graph = emit(dense, Edit(), maxima=maxima(dense, Edit(), [batch]))
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    want = [first(module(**feeds))]
    check_parity(run(graph, feeds), want, bound=IN_HALF, what="guarded")
    listed = {k.operator: k.reason for k in kept_in_fp32(graph)}
    assert set(listed) >= {"Mul", "LayerNormalization"}
    assert not set(listed) & {"Gemm", "MatMul"}
    assert "calibration" in listed["LayerNormalization"]
    assert not {k.operator for k in kept_in_fp32(emit(dense, Edit(), maxima={}))} & {
        "LayerNormalization"
    }


def test_values_that_are_no_numbers_count_as_infinite() -> None:
    dense = exported(nn.Linear(4, 4), {"input": torch.randn(2, 4)}, {"input": {0: "batch"}})
    batches = [{"input": np.full((2, 4), x, dtype=np.float32)} for x in (1.0, np.nan, 1.0)]
    assert maxima(dense, Edit(), batches)["result"] == np.inf


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_queries_that_see_nothing_stay_finite_and_do_not_reach_the_others(family: str) -> None:
    """Padding on the left of a decoder. What such a query gives is a matter of the mask alone:
    torch's kernels give zeros, a mask that is added an average. Nothing reads it."""
    module, dense = made(family)
    feeds = ZOO[family].example()
    feeds["attention_mask"][:] = 1
    feeds["attention_mask"][0, :3] = 0
    got, want = run(emit(dense, Edit(), maxima={}), feeds)[0], first(module(**feeds))
    assert np.isfinite(got).all()
    for row, start in ((0, 3), (1, 0)):
        seen = [got[row, start:]], [want[row, start:]]
        check_parity(*seen, bound=IN_HALF, what="queries that see something")


# --- int8 --------------------------------------------------------------------------------------


def maps_of(graph: OnnxGraph, *operators: str) -> list[str]:
    """Paths of maps, but for one whose weight an embedding has too."""
    held = Counter(graph.weights.values())
    return [
        name.removesuffix(".weight")
        for name, place in graph.weights.items()
        if any(n.op_type in operators for n in graph.map_nodes(name)) and held[place] == 1
    ]


def quantised(
    module: nn.Module, paths: list[str], feeds: Mapping[str, Tensor]
) -> dict[str, tuple[Int8Weights, ActivationRange]]:
    """Weights and ranges of maps; a hook makes `module` compute as they do."""
    ranges: dict[str, ActivationRange] = {}
    hooks = []
    for path in paths:

        def look(_: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            ends = activation_range(float(args[0].min()), float(args[0].max()))
            ranges[path] = symmetric(ends)

        hooks.append(module.get_submodule(path).register_forward_pre_hook(look))
    module(**feeds)
    for hook in hooks:
        hook.remove()
    held = {}
    for path in paths:
        layer, at = module.get_submodule(path), ranges[path]
        own = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight  # (out, in, ...)
        flat = quantize_weight(own.flatten(1))
        values = flat.values.view_as(own)
        own.copy_(flat.dequantized().view_as(own))
        layer.register_forward_pre_hook(
            lambda _, args, at=at: (fake_quantize_static(args[0].clone(), at),)
        )
        pair = (at.scale, at.zero_point)
        held[path] = (Int8Weights(values.numpy(), flat.scale.numpy(), pair), at)
    return held


@pytest.mark.parametrize("family", ["bert", "vit", "cifar-resnet8", "mobilenet-v2", "resnext"])
def test_every_map_in_int8_is_within_one_quantisation_step_of_its_simulation(family: str) -> None:
    """Each on the input that the graph gives it: a tie may round the other way."""
    dense, module, feeds = made(family)[1], ZOO[family].build(), ZOO[family].example()
    held = quantised(module, maps_of(dense, "MatMul", "Gemm", "Conv"), feeds)
    graph = emit(dense, Edit(int8={m: w for m, (w, _) in held.items()}), maxima={})
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    producers = graph.producers()
    checked = 0
    for step in nodes(graph, "MatMul", "Gemm", "Conv"):
        pair, weight = (producers.get(i) for i in step.input[:2])
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        assert pair is not None
        rounding = producers[pair.input[0]]
        names = rounding.input[0], step.output[0]
        x, got = (torch.from_numpy(v).float() for v in run(graph, feeds, *names)[-2:])
        integers, scale = (torch.from_numpy(graph.arrays[i].copy()) for i in weight.input[:2])
        assert integers.dtype == torch.int8
        assert scale.dtype == torch.float16
        axis = attribute(weight, "axis", 1)
        each = [-1 if i == axis else 1 for i in range(integers.dim())]
        w = integers.float() * scale.float().view(each)
        step_size = float(graph.arrays[rounding.input[1]])
        simulated = fake_quantize_static(x.clone(), ActivationRange(step_size, 128))
        if step.op_type == "Conv":
            strides, pads = attribute(step, "strides", [1, 1]), attribute(step, "pads", [0] * 4)
            groups = attribute(step, "group", 1)
            want = torch.conv2d(simulated, w, None, strides, pads[:2], groups=groups)
        else:
            want = simulated @ w
        if len(step.input) > 2:
            bias = torch.from_numpy(graph.arrays[step.input[2]].copy()).float()
            want += bias.view(-1, 1, 1) if step.op_type == "Conv" else bias
        one_step = step_size * float(w.abs().max())
        assert float((got - want).abs().max()) <= one_step + 2e-3 * float(want.abs().max())
        checked += 1
    assert checked == sum(len(dense.map_nodes(m + ".weight")) for m in held)


@pytest.mark.parametrize("family", ["bert", "gpt2", "distilbert", "vit", "cifar-resnet8"])
def test_a_network_in_int8_equals_its_simulation(family: str) -> None:
    dense, module, feeds = made(family)[1], ZOO[family].build(), ZOO[family].example()
    held = quantised(module, maps_of(dense, "MatMul", "Gemm", "Conv"), feeds)
    graph = emit(dense, Edit(int8={m: w for m, (w, _) in held.items()}), maxima={})
    check_parity(run(graph, feeds), [first(module(**feeds))], bound=0.1, what=family)


def test_maps_that_read_the_same_share_a_rounding_and_nothing_else_is_rounded() -> None:
    dense, module, feeds = made("bert")[1], ZOO["bert"].build(), ZOO["bert"].example()
    held = quantised(module, maps_of(dense, "MatMul"), feeds)
    graph = emit(dense, Edit(int8={m: w for m, (w, _) in held.items()}), maxima={})
    consumers, producers = graph.consumers(), graph.producers()
    roundings = nodes(graph, "QuantizeLinear")
    read = [consumers[consumers[q.output[0]][0].output[0]] for q in roundings]
    assert sorted({len(users) for users in read}) == [1, 3]  # q, k and v; each other map alone
    assert {u.op_type for users in read for u in users} == {"MatMul"}
    folded = [d for d in nodes(graph, "DequantizeLinear") if d.input[0] not in producers]
    assert len(folded) == len(held)
    assert all(not graph.arrays[i].any() for q in roundings for i in q.input[2:])


def test_scales_too_small_for_fp16_keep_their_weights() -> None:
    torch.manual_seed(0)
    module = nn.Linear(8, 4).requires_grad_(False)
    for channel, size in enumerate((1.0, 1e-3, 1e-5, 0.0)):
        module.weight[channel] *= size
    dense = exported(nn.Sequential(module), {"input": torch.randn(2, 8)}, {"input": {0: "batch"}})
    rounded = quantize_weight(module.weight)
    given = Int8Weights(rounded.values.numpy(), rounded.scale.numpy(), (0.02, 128))
    graph = emit(dense, Edit(int8={"0": given}), maxima={})
    values, scale = (graph.arrays[f"0.weight_0_{part}"] for part in ("int8", "scale"))
    assert (scale > 0).all()
    got = values.astype(np.float32).T * scale.astype(np.float32)[:, None]
    gap = np.abs(got - rounded.dequantized().numpy())
    assert (gap <= np.abs(got) * 2**-10 + scale.astype(np.float32)[:, None] / 2).all()


class Odd(nn.Module):
    """Widths that are no multiple of 4, an output that is always zero, maps that only see zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle = nn.Linear(10, 30), nn.Linear(30, 6), nn.Linear(6, 6)
        self.first.weight.data[3], self.first.bias.data[3] = 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        seen = self.second(self.first(x).relu())
        return seen + self.idle(seen * 0.0)


def odd() -> tuple[nn.Module, dict[str, Tensor], OnnxGraph]:
    """In INT8, on inputs of which one is always zero and another constant."""
    module, x = Odd().requires_grad_(False), torch.randn(4, 10)
    x[:, 0], x[:, 1] = 0.0, 7.0
    dense = exported(module, {"x": x}, {"x": {0: "batch"}})
    held = quantised(module, ["first", "second", "idle"], {"x": x})
    return module, {"x": x}, emit(dense, Edit(int8={m: w for m, (w, _) in held.items()}), maxima={})


def test_dead_and_constant_channels_and_odd_widths_run_in_int8() -> None:
    module, feeds, graph = odd()
    assert graph.op_counts()["QuantizeLinear"] == 3
    check_parity(run(graph, feeds), [first(module(**feeds))], bound=0.1, what="odd")


@needs_rtx
def test_tensorrt_builds_dead_and_constant_channels_and_odd_widths() -> None:
    workload = Workload(input_shapes={"x": (4, 10)})
    graph = odd()[2].to_bytes()
    assert build_engine(graph, builder="rtx", compute_capability="sm80", workload=workload).plan


@pytest.mark.parametrize(
    ("activation", "says"), [(None, "dynamic"), ((0.1, 3), "symmetric")], ids=["none", "skew"]
)
def test_ranges_that_tensorrt_has_not_are_refused(
    activation: tuple[float, int] | None, says: str
) -> None:
    path = "bert.encoder.layer.0.output.dense"
    weight = quantize_weight(made("bert")[0].get_submodule(path).weight)
    given = Int8Weights(weight.values.numpy(), weight.scale.numpy(), activation)
    with pytest.raises(ExportMismatch, match=says):
        emit(made("bert")[1], Edit(int8={path: given}), maxima={})


@needs_rtx
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "cifar-resnet8", "llama"])
def test_tensorrt_builds_networks_in_int8(family: str) -> None:
    dense, module, feeds = made(family)[1], ZOO[family].build(), ZOO[family].example()
    held = quantised(module, maps_of(dense, "MatMul", "Gemm", "Conv"), feeds)
    graph = emit(dense, Edit(int8={m: w for m, (w, _) in held.items()}), maxima={})
    workload = shapes_of(family)
    assert build_engine(
        graph.to_bytes(), builder="rtx", compute_capability="sm80", workload=workload
    ).plan


# --- what goes wrong ----------------------------------------------------------------------------


def refused(graph: OnnxGraph, operator: str) -> bytes:
    """A graph with an operator that no TensorRT knows, in place of the first of a kind."""
    proto = graph.to_proto()
    step = next(n for n in proto.graph.node if n.op_type == operator)
    step.op_type, step.domain = "Unheard", "nowhere"
    del step.attribute[:]
    proto.opset_import.append(helper.make_opsetid("nowhere", 1))
    return bytes(proto.SerializeToString())


@needs_rtx
@pytest.mark.parametrize(
    ("family", "operator", "module"),
    [
        ("bert", "Softmax", "attention"),
        ("cifar-resnet8", "Conv", "conv1"),
        ("yolo", "MaxPool", "sppf"),
    ],
)
def test_a_refusal_names_the_node_and_the_module_it_came_from(
    family: str, operator: str, module: str
) -> None:
    member = ZOO[family]
    program = trace(member.build(), member.example(), dynamic=member.dynamic, limits=LIMITS)
    graph = emit(made(family)[1], Edit(), maxima={})
    where = places(graph, program.exported)
    node = next(n for n in graph.to_proto().graph.node if n.op_type == operator)
    with pytest.raises(EngineFailed) as found:
        build_engine(
            refused(graph, operator),
            builder="rtx",
            compute_capability="sm80",
            workload=shapes_of(family),
            places=where,
        )
    assert node.name in str(found.value)
    assert module in where[node.name]
    assert where[node.name] in str(found.value)
