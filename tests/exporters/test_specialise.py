"""ONNX Runtime on an edited graph equals torch after surgery."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from tests.tiny_models import (
    FAMILIES,
    Case,
    Kept,
    build,
    case,
    dense_graph,
    edit_of,
    everything,
    exported,
    first,
    random_kept,
    sliced,
    surgered,
    text,
    traced,
)
from zipc.core.errors import ExportMismatch
from zipc.exporters.graph import OnnxGraph, node
from zipc.exporters.specialise import Edit, Int8Weights, count_integer_kernels, specialise
from zipc.numerics.int4 import INT4
from zipc.numerics.int8 import DYNAMIC, STATIC, ActivationRange, activation_range, quantize_weight
from zipc.pruner.graph import surgery
from zipc.runtimes import integer_kernels

FP32 = 1e-4
# The torch simulation and the integer kernels differ where float rounding puts a value on the other
# side of a rounding boundary: then one activation is off by a step of its scale. Outputs here are
# normalised, of size about 1 to 3.
INT8_MEAN, INT8_MAX = 5e-3, 0.25
INT4_MEAN = 2e-2  # the kernel rounds activations, in blocks; the simulation does not

pytestmark = pytest.mark.xdist_group("encoders")
families = pytest.mark.parametrize("family", FAMILIES)


def session(model: bytes, *, optimised: str = "", as_written: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimised:
        options.optimized_model_filepath = optimised
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_output(model: bytes, feeds: Mapping[str, Tensor]) -> np.ndarray:
    return session(model).run(None, {k: v.numpy() for k, v in feeds.items()})[0]


def torch_output(module: torch.nn.Module, feeds: Mapping[str, Tensor]) -> np.ndarray:
    with torch.no_grad():
        return first(module(**feeds)).numpy()


@families
def test_the_dense_graph_equals_the_module_at_other_sizes(family: str) -> None:
    made = case(family)
    model = dense_graph(family).to_bytes()
    onnx.checker.check_model(model, full_check=True)
    for batch, length in ((1, 1), (1, 9), (2, 7), (5, 33)):
        feeds = text(family, batch=batch, length=length, seed=batch)
        want = torch_output(made.module, feeds)
        got = onnx_output(model, feeds)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=FP32)


@families
def test_graphs_have_the_ecosystems_names_and_standard_operators(family: str) -> None:
    made = case(family)
    proto = dense_graph(family).to_proto()
    assert [i.name for i in proto.graph.input] == list(made.example)
    assert [o.name for o in proto.graph.output] == [made.output]
    assert {o.domain for o in proto.opset_import} <= {"", "ai.onnx"}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        assert [d.dim_param for d in dims] == ["batch", "sequence"]


@families
@pytest.mark.parametrize("seed", range(3))
def test_random_allocations_equal_surgery(family: str, seed: int) -> None:
    made = case(family)
    kept = random_kept(made, seed)
    model = specialise(dense_graph(family), edit_of(made, kept)).to_bytes()
    module = surgered(made, kept)
    for batch, length in ((2, 7), (1, 1), (3, 19)):
        feeds = text(family, batch=batch, length=length, seed=seed)
        want = torch_output(module, feeds)
        got = onnx_output(model, feeds)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=FP32)


@families
def test_each_site_removed_alone_equals_surgery_and_frees_its_operators(family: str) -> None:
    made = case(family)
    dense = dense_graph(family)
    for site in made.inner:
        kept = everything(made) | {site.name: []}
        graph = specialise(dense, edit_of(made, kept))
        proto = graph.to_proto()
        left = {name for n in proto.graph.node for name in n.input}
        for module in site.maps:
            held = dense.weights[module + ".weight"][0]
            assert held not in left, f"{module} is still computed"
        feeds = text(family, batch=2, length=5)
        got = onnx_output(graph.to_bytes(), feeds)
        np.testing.assert_allclose(got, torch_output(surgered(made, kept), feeds), atol=FP32)


@families
def test_everything_removed_equals_surgery(family: str) -> None:
    made = case(family)
    kept = everything(made) | {site.name: [] for site in made.inner}
    graph = specialise(dense_graph(family), edit_of(made, kept))
    feeds = text(family, batch=3, length=6)
    got = onnx_output(graph.to_bytes(), feeds)
    np.testing.assert_allclose(got, torch_output(surgered(made, kept), feeds), atol=FP32)


def test_specialising_leaves_the_dense_graph_as_it_was() -> None:
    made = case("bert")
    dense = dense_graph("bert")
    before = dense.to_bytes()
    kept = random_kept(made, 0)
    edit, ranges = quantised(made, kept, STATIC)
    assert ranges
    specialise(dense, edit)
    assert dense.to_bytes() == before


def test_biases_that_are_all_zero_stay_apart() -> None:
    """Freshly made heads have equal biases; merging equal tensors would couple their edits."""
    module = build("bert")
    for name, value in module.named_parameters():
        if name.endswith(".bias"):
            value.data.zero_()
    made = traced(module, text("bert"))
    dense = exported(made, made.output)
    kept = random_kept(made, 1, removed=False)
    edit = edit_of(made, kept)
    other = {n: v + np.float32(0.01 * i) for i, (n, v) in enumerate(edit.tensors.items())}
    module = surgered(made, kept)
    module.load_state_dict({n: torch.from_numpy(v) for n, v in other.items()}, strict=False)
    feeds = text("bert", length=9)
    got = onnx_output(specialise(dense, Edit(other)).to_bytes(), feeds)
    np.testing.assert_allclose(got, torch_output(module, feeds), atol=FP32)


def test_a_linear_without_bias_can_be_given_one() -> None:
    module = build("bert")
    path = "encoder.layer.0.output.dense"
    module.get_submodule(path).bias = None
    made = traced(module, text("bert"))
    dense = exported(made, made.output)
    bias = torch.linspace(-1, 1, 32)
    module.get_submodule(path).bias = torch.nn.Parameter(bias, requires_grad=False)
    got = onnx_output(
        specialise(dense, Edit({path + ".bias": bias.numpy()})).to_bytes(), made.example
    )
    np.testing.assert_allclose(got, torch_output(module, made.example), atol=FP32)


def test_a_tensor_that_is_not_in_the_graph_is_an_error() -> None:
    with pytest.raises(ExportMismatch, match=r"encoder\.nowhere"):
        specialise(dense_graph("bert"), Edit({"encoder.nowhere.weight": np.zeros((2, 2), "f4")}))


# --- int8 --------------------------------------------------------------------------------------


def quantised(
    made: Case, kept: Kept, numeric: str, *, only: int | None = None
) -> tuple[Edit, dict[str, tuple[Int8Weights, ActivationRange | None]]]:
    """An edit with every linear of the kept sites on integers."""
    weights = made.weights | sliced(made, kept)[0]
    modules = []
    for site in made.inner[:only]:
        if kept[site.name]:
            modules += site.maps
    inputs: dict[str, Tensor] = {}
    hooked = surgered(made, kept)
    for path in modules:
        hooked.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs.update({path: args[0]})
        )
    with torch.no_grad():
        hooked(**made.example)
    held: dict[str, tuple[Int8Weights, ActivationRange | None]] = {}
    for path in modules:
        rounded = quantize_weight(weights[path + ".weight"], numeric=numeric)
        at = None
        if numeric == STATIC:
            at = activation_range(float(inputs[path].min()), float(inputs[path].max()))
        pair = None if at is None else (at.scale, at.zero_point)
        held[path] = (Int8Weights(rounded.values.numpy(), rounded.scale.numpy(), pair), at)
    return edit_of(made, kept, {path: w for path, (w, _) in held.items()}), held


def simulated(
    made: Case,
    kept: Kept,
    numeric: str,
    held: Mapping[str, tuple[Int8Weights, ActivationRange | None]],
) -> torch.nn.Module:
    module = surgered_int8(made, kept, dict.fromkeys(held, numeric))
    for path, (weights, at) in held.items():
        linear = module.get_submodule(path)
        linear.weight.copy_(torch.from_numpy(weights.values))
        linear.weight_scale.copy_(torch.from_numpy(weights.scale))
        if at is not None:
            linear.input_scale.fill_(at.scale)
            linear.input_zero_point.fill_(at.zero_point)
    return module


def surgered_int8(made: Case, kept: Kept, numerics: Mapping[str, str]) -> torch.nn.Module:
    widths = {name: len(units) for name, units in kept.items()}
    document = surgery.describe(
        made.module, made.program, made.structure, widths=widths, numerics=numerics
    )
    module = copy.deepcopy(made.module)
    surgery.apply_structure_(module, document)
    float_state = surgered(made, kept).state_dict()
    wanted = module.state_dict()
    fitting = {n: v for n, v in float_state.items() if n in wanted and v.dtype == wanted[n].dtype}
    module.load_state_dict(fitting, strict=False)
    return module.eval()


@families
@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC, INT4])
def test_integer_graphs_equal_the_torch_simulation(
    family: str, numeric: str, tmp_path: Path
) -> None:
    made = case(family)
    kept = random_kept(made, 2, removed=False)
    if len(made.inner) > 2:
        kept[made.inner[1].name] = []
    edit, held = quantised(made, kept, numeric)
    graph = specialise(dense_graph(family), edit)
    module = simulated(made, kept, numeric, held)
    gaps = []  # of all: on some processor any one of them may lie between two steps
    for batch, length in ((1, 1), (2, 7), (3, 19)):
        feeds = text(family, batch=batch, length=length)
        got, want = onnx_output(graph.to_bytes(), feeds), torch_output(module, feeds)
        assert got.shape == want.shape
        gaps.append(np.abs(got - want).ravel())
    gap = np.concatenate(gaps)
    assert gap.mean() < (INT4_MEAN if numeric == INT4 else INT8_MEAN)
    assert gap.max() < INT8_MAX
    calls = sum(len(dense_graph(family).map_nodes(p + ".weight")) for p in held)
    path = tmp_path / "optimised.onnx"
    session(graph.to_bytes(), optimised=str(path))
    if numeric != INT4 or family != "albert":  # of equal scales, up to 8, ONNX Runtime makes one
        assert count_integer_kernels(onnx.load(path).graph.node) == calls


@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC])
def test_one_int8_site_equals_the_simulation_to_float_rounding(numeric: str) -> None:
    """With one site in int8 only few values can flip, and none at most seeds."""
    gaps = []
    for family in ("bert", "distilbert", "electra"):
        made = case(family)
        kept = everything(made)
        edit, held = quantised(made, kept, numeric, only=1)
        model = specialise(dense_graph(family), edit).to_bytes()
        gap = onnx_output(model, made.example) - torch_output(
            simulated(made, kept, numeric, held), made.example
        )
        gaps.append(float(np.abs(gap).max()))
    assert np.median(gaps) < FP32


def test_int4_weights_are_unpacked_by_the_kernel_and_leave_attention_fused(tmp_path: Path) -> None:
    """Weights of any number of inputs: here 32, 20, 7 and fewer."""
    made = case("bert")
    kept = random_kept(made, 4, removed=False)
    edit, held = quantised(made, kept, INT4)
    graph = specialise(dense_graph("bert"), edit)
    onnx.checker.check_model(graph.to_bytes(), full_check=True)
    path = tmp_path / "optimised.onnx"
    session(graph.to_bytes(), optimised=str(path))
    optimised = onnx.load(path).graph
    counts = OnnxGraph.of(onnx.load(path)).op_counts()
    assert counts["MatMulNBits"] == len(held)
    assert counts["DequantizeLinear"] == 0
    assert graph.op_counts()["Attention"] == dense_graph_of(made, kept).op_counts()["Attention"] > 0
    biases = {f"{module}.bias" for module in held}
    assert {n.op_type for n in optimised.node if biases & set(n.input)} == {
        "MatMulNBits",
        "BiasGelu",
    }


@pytest.mark.parametrize("after", ["Relu", "Clip", "Gelu", "Neg"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [["rows", 40], ["batch", "rows", 40]])
def test_int4_products_have_their_kernel_whatever_follows(
    shape: list[int | str], bias: bool, after: str
) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((12, 40)).astype(np.float32)
    rounded = quantize_weight(torch.from_numpy(weight), numeric=INT4)
    ends = ["low", "high"] if after == "Clip" else []
    nodes = [
        node("MatMul", ["x", "w"], ["product"]),
        *([node("Add", ["product", "b"], ["sum"])] if bias else []),
        node(after, ["sum" if bias else "product", *ends], ["after"]),
        node("Tanh", ["after"], ["y"]),
    ]
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes)
        for name, axes in (("x", shape), ("y", [*shape[:-1], 12]))
    ]
    header = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
    )
    graph = OnnxGraph.of(header)
    graph.arrays = {
        "w": weight.T,
        "b": generator.standard_normal(12).astype(np.float32),
        "low": np.array(-0.5, np.float32),
        "high": np.array(0.5, np.float32),
    }
    graph.weights = {"map.weight": ("w", True), "map.bias": ("b", False)}
    integers = Int8Weights(rounded.values.numpy(), rounded.scale.numpy())
    floats = Edit(tensors={"map.weight": rounded.dequantized().numpy()})
    model = specialise(graph, Edit(int8={"map": integers})).to_bytes()
    assert integer_kernels(model) == 1
    x = generator.standard_normal([100 if isinstance(n, str) else n for n in shape])
    feeds = {"x": torch.from_numpy(x.astype(np.float32))}
    want = onnx_output(specialise(graph, floats).to_bytes(), feeds)
    error = np.linalg.norm(onnx_output(model, feeds) - want) / np.linalg.norm(want)
    assert error < 0.05  # the kernel rounds the inputs to INT8


@families
def test_int4_graphs_as_written_equal_the_simulation_to_float_rounding(family: str) -> None:
    made = case(family)
    kept = random_kept(made, 3, removed=False)
    edit, held = quantised(made, kept, INT4)
    feeds = text(family, batch=2, length=7)
    written = session(specialise(dense_graph(family), edit).to_bytes(), as_written=True)
    got = written.run(None, {k: v.numpy() for k, v in feeds.items()})[0]
    want = torch_output(simulated(made, kept, INT4, held), feeds)
    np.testing.assert_allclose(got, want, atol=FP32)


def dense_graph_of(made: Case, kept: Kept) -> OnnxGraph:
    return specialise(dense_graph("bert"), edit_of(made, kept))


def test_modules_that_share_an_input_share_its_quantisation() -> None:
    made = case("bert")
    for numeric, operator in ((DYNAMIC, "DynamicQuantizeLinear"), (STATIC, "QuantizeLinear")):
        edit, _ = quantised(made, everything(made), numeric, only=1)
        counts = specialise(dense_graph("bert"), edit).op_counts()
        assert counts[operator] == 2  # one for q, k and v, one for the output map


@pytest.mark.parametrize("numeric", [DYNAMIC, STATIC])
def test_integer_kernels_add_the_bias_themselves(numeric: str, tmp_path: Path) -> None:
    made = case("bert")
    edit, held = quantised(made, everything(made), numeric)
    path = tmp_path / "optimised.onnx"
    session(specialise(dense_graph("bert"), edit).to_bytes(), optimised=str(path))
    optimised = onnx.load(path).graph
    biases = {f"{module}.bias" for module in held}
    read_by = {n.op_type for n in optimised.node if biases & set(n.input)}
    assert read_by <= {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    assert biases <= {i for n in optimised.node for i in n.input}


def test_int8_files_are_smaller() -> None:
    made = case("bert")
    dense = dense_graph("bert")
    edit, _ = quantised(made, everything(made), DYNAMIC)
    linears = sum(made.weights[p + ".weight"].numel() for p in edit.int8)
    size = len(specialise(dense, edit).to_bytes())
    assert size < len(dense.to_bytes()) - linears
    edit, _ = quantised(made, everything(made), INT4)
    assert len(specialise(dense, edit).to_bytes()) < size


def test_a_graph_round_trips_through_its_proto() -> None:
    dense = dense_graph("bert")
    again = OnnxGraph.of(dense.to_proto())
    feeds = text("bert")
    np.testing.assert_array_equal(
        onnx_output(again.to_bytes(), feeds), onnx_output(dense.to_bytes(), feeds)
    )
