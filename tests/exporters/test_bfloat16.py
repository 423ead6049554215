"""Products in bf16: standard operators, and kernels in bf16 under OpenVINO."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.exporters.test_specialise import quantised, surgered_int8, torch_output
from tests.tiny_models import case, dense_graph, edit_of, everything, text
from zipc.core.types import Workload
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.openvino import OPENVINO
from zipc.exporters.specialise import Edit, specialise
from zipc.numerics.bf16 import BF16, converted, rounded
from zipc.numerics.int8 import STATIC
from zipc.profiler.facts import fingerprint
from zipc.profiler.runners.openvino import (
    OpenVinoRunner,
    narrow_products,
)

FAMILY = "bert"
able = pytest.mark.skipif(
    not any("bf16" in feature for feature in fingerprint("openvino")["isa"]),
    reason="this processor has no instructions for bf16",
)


def emitted(modules: list[str]) -> bytes:
    made = case(FAMILY)
    held = {f"{m}.weight": rounded(made.weights[f"{m}.weight"]).numpy() for m in modules}
    plain = edit_of(made, everything(made), {})
    edit = replace(plain, tensors={**plain.tensors, **held}, bf16=modules)
    return specialise(dense_graph(FAMILY), edit, emitter=OPENVINO).to_bytes()


def maps() -> list[str]:
    made = case(FAMILY)
    return list(dict.fromkeys(m for site in made.inner for m in site.maps))


def test_the_graph_is_standard_and_those_that_read_a_value_share_its_cast() -> None:
    model = onnx.load_from_string(emitted(maps()))
    onnx.checker.check_model(model, full_check=True)
    casts = [n for n in model.graph.node if n.op_type == "Cast"]
    into = [n.input[0] for n in casts if n.attribute[0].i == TensorProto.BFLOAT16]
    assert len(into) == len(set(into)) < len(maps())  # query, key and value read the same
    narrow = {t.name for t in model.graph.initializer if t.data_type == TensorProto.BFLOAT16}
    assert len(narrow) == len(maps())


@able
def test_openvino_runs_these_products_in_bf16_and_no_others() -> None:
    made, some = case(FAMILY), maps()[::2]
    assert narrow_products(emitted(some))["bf16"] == len(some)
    assert narrow_products(emitted([]))["bf16"] == 0
    module = surgered_int8(made, everything(made), dict.fromkeys(some, BF16))
    for path in some:
        weight = made.weights[f"{path}.weight"]
        module.get_submodule(path).weight.copy_(weight.to(torch.bfloat16))
    feeds = text(FAMILY, batch=2, length=7)
    want = torch_output(module, feeds)
    exact = torch_output(made.module, feeds)
    runner = OpenVinoRunner(emitted(some), workload=Workload(batch_size=2, sequence_length=7))
    got = runner.outputs({k: v.numpy() for k, v in feeds.items()})["last_hidden_state"]
    assert np.linalg.norm(got - want) < 0.5 * np.linalg.norm(exact - want)
    assert np.linalg.norm(got - exact) < 0.02 * np.linalg.norm(exact)


@able
def test_attention_in_bf16_goes_with_the_rest_in_int8() -> None:
    """OpenVINO moves casts of such graphs about, and would refuse this one."""
    made = case(FAMILY)
    heads = [m for site in made.inner if site.kind == "heads" for m in site.maps]
    integers, _ = quantised(made, everything(made), STATIC)
    rest = {m: w for m, w in integers.int8.items() if m not in heads}
    held = {f"{m}.weight": rounded(made.weights[f"{m}.weight"]).numpy() for m in heads}
    edit = replace(integers, tensors={**integers.tensors, **held}, int8=rest, bf16=heads)
    model = specialise(dense_graph(FAMILY), edit, emitter=OPENVINO).to_bytes()
    assert narrow_products(model)["bf16"] == len(heads)
    assert narrow_products(model)["int8"] == len(rest)
    feeds = text(FAMILY, batch=2, length=7)
    runner = OpenVinoRunner(model, workload=Workload(batch_size=2, sequence_length=7))
    got = runner.outputs({k: v.numpy() for k, v in feeds.items()})["last_hidden_state"]
    exact = torch_output(made.module, feeds)
    assert np.linalg.norm(got - exact) < 0.1 * np.linalg.norm(exact)


@able
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_with_its_bias_runs_in_bf16_too(transposed: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-9, 9, (32, 64)).astype(np.float32)
    held = {"w": weight if transposed else weight.T, "b": rng.standard_normal(32, np.float32)}
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 64), ("y", 32))
    ]
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=transposed)
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    dense = OnnxGraph.of(
        helper.make_model(helper.make_graph([gemm], "g", ends[:1], ends[1:], initializer=tensors))
    )
    dense.weights = {"l.weight": ("w", not transposed)}
    model = specialise(dense, Edit(bf16=["l"]), emitter=OPENVINO).to_bytes()
    onnx.checker.check_model(model, full_check=True)
    assert narrow_products(model)["bf16"] == 1
    x = rng.standard_normal((5, 64), np.float32)
    runner = OpenVinoRunner(model, workload=Workload(batch_size=5))
    product = rounded(converted(torch.from_numpy(x)) @ torch.from_numpy(weight.T)).numpy()
    away = np.abs(runner.outputs({"x": x})["y"] - (product + held["b"]))
    assert (away > 1e-5).mean() < 0.05  # sums in another order may be rounded otherwise
    assert (away <= 2**-7 * np.abs(product) + 1e-5).all()
