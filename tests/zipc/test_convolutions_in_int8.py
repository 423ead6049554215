"""Single convolutions in INT8 on targets under TensorRT: offered, rounded, judged and built."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.tiny_project import Told, request
from zipc.core.types import InputSpec, Level
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.tensorrt.engine import build_engine
from zipc.groundwork import price_model
from zipc.manifest import Manifest
from zipc.pipeline import compile_model

pytestmark = pytest.mark.usefixtures("little_effort")

BIG = """
import torch

def net():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 128, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(128, 128, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(128, 128, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(128, 16, 3, padding=1),
    )
"""


@pytest.mark.parametrize(("batch", "offered"), [(16, True), (1, False)])
def test_a_convolution_is_offered_int8_where_its_gain_is_beyond_doubt(
    tmp_path: Path, batch: int, offered: bool
) -> None:
    (tmp_path / "nets.py").write_text(BIG)
    asked = request(
        Path(f"{tmp_path}/nets.py:net"),
        *(None, None, tmp_path / "cache"),
        target="orin",
        input_shapes=(InputSpec("input", "float32", (batch, 3, 32, 32)),),
        sequence_length=None,
    )
    prices = price_model(asked, progress=Told()).prices
    assert prices.gains("2", Level(128, "int8-static")) is offered


FAMILIES = """
from tests.zoo import ZOO

def resnet():
    return ZOO["cifar-resnet8"].build()

def yolo():
    return ZOO["yolo"].build()
"""


@pytest.fixture(scope="module", params=[("resnet", "a100"), ("yolo", "orin")], ids="-".join)
def rounded(
    request: pytest.FixtureRequest, little_effort: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    name, target = request.param
    return in_int8(tmp_path_factory.mktemp(name), name, target=target)


def in_int8(root: Path, name: str, *, target: str) -> tuple[Path, Manifest]:
    """Compile a network of convolutions with all its sites in INT8."""
    (root / "nets.py").write_text(FAMILIES)
    images = np.random.default_rng(0).normal(size=(120, 3, 32, 32)).astype(np.float32)
    np.savez(root / "images.npz", x=images)
    asked = request(
        Path(f"{root}/nets.py:{name}"),
        *(root / "images.npz", root / "out", root / "cache"),
        target=target,
        input_shapes=(InputSpec("x", "float32", (2, 3, 32, 32)),),
        sequence_length=None,
    )
    asked = replace(asked, numerics="int8-static", speedup=None, prune=False)
    return root / "out", compile_model(asked, progress=Told())


def test_convolutions_in_int8_are_rounded_at_their_inputs_and_nowhere_else(
    rounded: tuple[Path, Manifest],
) -> None:
    out, manifest = rounded
    assert {a.level.numeric for a in manifest.allocation} == {"int8-static"}
    graph = OnnxGraph.of(onnx.load(out / "model.onnx"))
    consumers, producers = graph.consumers(), graph.producers()
    pairs = [n for n in graph.nodes if n.op_type == "DequantizeLinear"]
    users = [u for n in pairs for u in consumers[n.output[0]]]
    assert {u.op_type for u in users} <= {"Conv", "Gemm", "MatMul"}
    images = [n.input[0] for n in graph.nodes if n.op_type == "QuantizeLinear"]
    assert len(images) == len(set(images))  # those that read the same image share its scale
    convolutions = [n for n in graph.nodes if n.op_type == "Conv"]
    integer = [n for n in convolutions if n.input[1] in producers]
    assert len(integer) >= len(convolutions) // 2
    for node in integer:
        assert producers[node.input[0]].op_type == "DequantizeLinear"
        assert graph.arrays[producers[node.input[1]].input[0]].dtype == np.int8


def test_the_quality_of_convolutions_in_int8_is_read_from_the_graph(
    rounded: tuple[Path, Manifest],
) -> None:
    quality = rounded[1].quality
    assert quality is not None
    assert quality.compiled is not None
    assert 80 < quality.compiled < 100


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"
)
@pytest.mark.parametrize("capability", ["sm80", "sm86", "sm89"])
def test_tensorrt_builds_convolutions_in_int8(
    rounded: tuple[Path, Manifest], capability: str
) -> None:
    out, manifest = rounded
    model = (out / "model.onnx").read_bytes()
    workload = manifest.workload
    built = build_engine(model, builder="rtx", compute_capability=capability, workload=workload)
    assert built.plan
