"""ONNX Runtime equals torch for every family, and every parameter of the graph is its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx
from torch.func import functional_call

from tests.three_ways import single
from tests.tiny_models import Case
from tests.zoo import ZOO
from zipc.core.types import Workload
from zipc.exporters.finish import finish
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.onnx_export import check_parity
from zipc.exporters.site_graph import extract
from zipc.exporters.specialise import Edit, specialise
from zipc.exporters.tensorrt.emit import TensorRt, emit
from zipc.exporters.tensorrt.engine import build_engine
from zipc.exporters.tensorrt.half import kept_in_fp32
from zipc.exporters.tensorrt.lower import lower_
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner, StandInRunner

BOUND = 1e-4
IN_HALF = 2e-2
AMPLIFY = {"mobilenet-v3": 0.3}  # fp16 weights alone move this random network by that in torch
UNKNOWN_TO_10_3 = {"Attention", "RMSNormalization", "RotaryEmbedding", "MatMulInteger"}
pytestmark = pytest.mark.xdist_group("zoo")
families = pytest.mark.parametrize("family", ZOO)
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"
)
# operators whose kernels the graphs of a family are written for
EXPECTED = {
    "gpt2": {"Attention": 2, "Gelu": 2, "Split": 2},
    "opt": {"Attention": 2},
    "llama": {"Attention": 2, "RotaryEmbedding": 4, "RMSNormalization": 5},
    "llama-mqa": {"Attention": 2, "RotaryEmbedding": 4, "RMSNormalization": 5},
    "qwen2": {"Attention": 2, "RotaryEmbedding": 4, "RMSNormalization": 5},
    "mistral": {"Attention": 2, "RotaryEmbedding": 4, "RMSNormalization": 5},
    "mixtral": {"Attention": 2, "RotaryEmbedding": 4, "RMSNormalization": 5},
    "t5": {"Attention": 6, "RMSNormalization": 12},
    "vit": {"Attention": 2, "Where": 0},
    "swin": {"Attention": 4, "Pad": 0},
    "mpnet": {"Attention": 2, "Softmax": 0},
    "bottleneck-resnet": {"GlobalAveragePool": 1, "BatchNormalization": 15},
}


def finished(graph: OnnxGraph) -> OnnxGraph:
    copy = graph.copy()
    finish(copy)
    return copy


def run(
    graph: OnnxGraph,
    feeds: Mapping[str, Tensor],
    runner: type[OnnxRuntimeRunner] = OnnxRuntimeRunner,
) -> list[np.ndarray]:
    session = runner.open(graph.to_bytes(), runner.options(Workload()))
    return session.run(None, {i.name: feeds[i.name].numpy() for i in session.get_inputs()})


def inputs(family: str) -> list[dict[str, Tensor]]:
    """Inputs of the traced sizes and of others."""
    example = ZOO[family].example
    if ZOO[family].modality == "image":
        return [example(), example(batch=1, seed=1), example(batch=3, seed=2)]
    sizes = ((2, 7), (1, 5), (3, 11))
    return [example(batch=b, length=n, seed=n) for b, n in sizes]


def wanted(made: Case, feeds: Mapping[str, Tensor]) -> list[np.ndarray]:
    return [result.numpy() for result in made.chosen(made.module(**feeds))]


@families
def test_onnx_runtime_equals_torch_at_traced_and_other_sizes(family: str) -> None:
    made, graph = single(family)
    for candidate in (graph, finished(graph)):
        onnx.checker.check_model(candidate.to_proto(), full_check=True)
        for feeds in inputs(family):
            check_parity(run(candidate, feeds), wanted(made, feeds), bound=BOUND, what=family)


@families
def test_every_parameter_can_be_edited_alone(family: str) -> None:
    """All of them at once get values of their own: equal ones and folded ones would show."""
    made, graph = single(family)
    names = {n for n, _ in made.program.tensors.values()}
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, old in made.module.state_dict().items():
        noise = torch.rand(old.shape, generator=generator) * 0.4 + 0.8
        if name in names and old.is_floating_point():
            state[name] = old * noise
            assert name in graph.weights, name
    tied = {graph.weights[n][0]: n for n in state}
    state = {n: state[tied[graph.weights[n][0]]] for n in state}
    edited = graph.copy()
    for name, value in state.items():
        stored, turned = graph.weights[name]
        assert edited.arrays[stored].shape == (value.T if turned else value).shape
        edited.arrays[stored] = (value.T if turned else value).numpy()
    feeds = ZOO[family].example()
    want = [t.numpy() for t in made.chosen(functional_call(made.module, state, (), feeds))]
    check_parity(run(finished(edited), feeds), want, bound=BOUND, what=family)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(want[0], wanted(made, feeds)[0], rtol=1e-2)


@pytest.mark.parametrize(
    "family", ["cifar-resnet8", "groupnorm", "shufflenet", "yolo", "gpt2", "llama", "t5", "swin"]
)
def test_results_name_the_values_that_traced_nodes_compute(family: str) -> None:
    made, graph = single(family)
    program = made.program
    feeds = ZOO[family].example()
    values: dict[str, object] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n.name] = super().run_node(n)
            return values[n.name]

    exported = program.exported.module()
    Recorder(exported).run(*feeds.values())
    held = {
        name: value
        for name, value in graph.results.items()
        if isinstance(values.get(name), Tensor) and value not in graph.outputs()
    }
    # of what a fusion took in, nothing is left
    assert len(held) > 0.4 * sum(n.op == "call_function" for n in program.nodes)
    inner = graph.copy()
    inner.proto = onnx.ModelProto()
    inner.proto.CopyFrom(graph.proto)
    for value in dict.fromkeys(held.values()):
        shape = [None] * len(graph.shapes[value])
        inner.proto.graph.output.append(
            helper.make_tensor_value_info(value, graph.types[value], shape)
        )
    got = dict(zip([o.name for o in inner.proto.graph.output], run(inner, feeds), strict=True))
    for name, value in held.items():
        expected = values[name].numpy()  # type: ignore[attr-defined]
        if expected.dtype == np.float32 and np.abs(expected).max(initial=0.0) < 1e9:
            check_parity([got[value]], [expected], bound=BOUND, what=name)
    origins = set(graph.origin.values())
    assert origins <= {n.name for n in program.nodes}
    weighty = {"conv2d", "linear", "addmm", "conv_transpose2d", "embedding"}
    for node in program.nodes:
        if str(node.target).removeprefix("aten.").split(".")[0] in weighty:
            assert node.name in origins, node.name


@pytest.mark.parametrize("family", EXPECTED)
def test_graphs_hold_the_operators_that_run_fast(family: str) -> None:
    graph = finished(single(family)[1])
    graph.nodes = list(graph.to_proto().graph.node)
    counts = graph.op_counts()
    assert {op: counts[op] for op in EXPECTED[family]} == EXPECTED[family]


@families
def test_graphs_are_of_the_standard_domain_and_say_nothing_of_their_making(family: str) -> None:
    graph = finished(single(family)[1])
    proto = graph.to_proto()
    assert {o.domain for o in proto.opset_import} <= {"", "ai.onnx"}
    assert not any(n.metadata_props for n in proto.graph.node)
    assert b"site-packages" not in proto.SerializeToString()
    assert {n.domain for n in proto.graph.node} <= {"", "ai.onnx"}


# --- TensorRT -----------------------------------------------------------------------------------


@families
def test_a_graph_for_tensorrt_equals_torch_and_keeps_names_types_and_axes(family: str) -> None:
    made, dense = single(family)
    lowered = dense.copy()
    lower_(lowered)
    graph = emit(dense, Edit(), maxima={})
    proto = graph.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert list(proto.graph.input) == list(dense.proto.graph.input)
    assert list(proto.graph.output) == list(dense.proto.graph.output)
    sizes = {"length": 9} if ZOO[family].modality == "text" else {}
    for feeds in (ZOO[family].example(), ZOO[family].example(batch=3, seed=2, **sizes)):
        want = wanted(made, feeds)
        check_parity(run(lowered, feeds), want, bound=BOUND, what="in fp32")
        bound = AMPLIFY.get(family, IN_HALF)
        check_parity(run(graph, feeds, StandInRunner), want, bound=bound, what="in fp16")


@families
def test_in_a_graph_for_tensorrt_products_and_norms_are_in_fp16(family: str) -> None:
    _, dense = single(family)
    graph = emit(dense, Edit(), maxima={})
    proto = graph.to_proto()
    assert {o.domain: o.version for o in proto.opset_import} == {"": 20}
    assert not UNKNOWN_TO_10_3 & {n.op_type for n in proto.graph.node}
    heavy = ("MatMul", "Gemm", "Conv", "ConvTranspose", "LayerNormalization", "Softmax")
    kept = {k.node for k in kept_in_fp32(graph)}
    for step in proto.graph.node:
        if step.op_type not in heavy:
            continue
        from_numbers = step.name in kept  # rotary angles are a product of positions
        kind = TensorProto.FLOAT if from_numbers else TensorProto.FLOAT16
        assert {graph.types[i] for i in step.input if i} == {kind}, step.name
    counts = (g.op_counts()["LayerNormalization"] for g in (dense, graph))
    assert len(set(counts)) == 1


@needs_rtx
@families
def test_tensorrt_builds_the_graph_of_every_family(family: str) -> None:
    graph = emit(single(family)[1], Edit(), maxima={})
    shapes = {name: tuple(t.shape) for name, t in ZOO[family].example().items()}
    workload = Workload(sequence_length=None, input_shapes=shapes)
    built = build_engine(
        graph.to_bytes(), builder="rtx", compute_capability="sm80", workload=workload
    )
    assert len(built.plan) > 1000


@needs_rtx
@families
def test_tensorrt_builds_every_kind_of_site_alone(family: str) -> None:
    """They are what a board is priced by."""
    made, dense = single(family)
    dense = dense.copy()
    named = {"target": "decoder_sequence"}  # as a workload calls it
    dense.shapes = {n: [named.get(str(d), d) for d in held] for n, held in dense.shapes.items()}
    workload = Workload(batch_size=2, sequence_length=7 if ZOO[family].modality == "text" else None)
    alike = {site.signature: site for site in made.inner}
    for site in alike.values():
        part = specialise(extract(dense, site), Edit(), part=True, emitter=TensorRt({}))
        built = build_engine(
            part.to_bytes(), builder="rtx", compute_capability="sm80", workload=workload
        )
        assert len(built.plan) > 1000
