"""`inspect`: what can be removed, before anything is compiled; and what an ONNX file holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import BertConfig, BertModel

import zipc
from tests.command_line import Run
from zipc.core.errors import ExportMismatch, UnsupportedModel, UsageError
from zipc.core.shapes import parse_input_shapes
from zipc.inspect import inspect_model, inspect_onnx

ROOT = Path(__file__).parents[2]
BRANCHES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 4)
        self.register_buffer("doubled", torch.tensor(1))

    def forward(self, x):
        x = self.up(x).relu()
        return self.down(2 * x if self.doubled > 0 else x)

def net():
    return Net()
"""

THRICE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        for _ in range(3):
            x = x + self.down(self.up(x).relu())
        return x

def net():
    return Net()
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with weights and config and nothing else."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(num_hidden_layers=2, vocab_size=50, **sizes)
    folder = tmp_path_factory.mktemp("models") / "bare"
    BertModel(config).save_pretrained(folder)
    return folder


def test_folder_without_tokenizer_gives_sites_units_and_consumers(bare: Path) -> None:
    found = inspect_model(str(bare), measure=False)
    kinds = {site["name"]: (site["kind"], site["units"]) for site in found["sites"]}
    assert kinds == {
        f"encoder.layer.{i}.{part}": value
        for i in range(2)
        for part, value in (("attention.self", ("heads", 4)), ("intermediate.dense", ("ffn", 64)))
    }
    ffn = found["sites"][1]
    assert ffn["consumers"] == ["encoder.layer.0.output.dense"]
    assert ffn["parameters"] == 32 * 64 + 64 + 64 * 32
    assert ffn["widths"][0] == 0
    assert ffn["widths"][-1] == 64
    assert any("no tokenizer" in note for note in found["notes"])


def test_every_site_has_its_share_of_parameters_and_time(bare: Path) -> None:
    found = inspect_model(str(bare))
    assert found["latency_ms"] > 0
    assert found["workload"] == "batch 1, sequence 128, 1 thread"
    for site in found["sites"]:
        assert site["parameter_share"] == site["parameters"] / found["parameters"]
        assert 0 < site["latency_share"] < 1


class Timer:
    """A run takes `start_ms`, and `product_ms` for every product."""

    def __init__(self, *, start_ms: float, product_ms: float) -> None:
        self.start_ms, self.product_ms = start_ms, product_ms

    def load(self, model: bytes, **_: object) -> Any:
        products = [n for n in onnx.load_from_string(model).graph.node if n.op_type == "Gemm"]
        ms = self.start_ms + self.product_ms * len(products)
        return SimpleNamespace(run=lambda: ms)


@pytest.mark.parametrize("start_ms", [0.1, 100.0])
def test_what_it_costs_to_run_a_graph_is_in_no_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_ms: float
) -> None:
    """Its site is called three times, and all products are of it."""
    (tmp_path / "nets.py").write_text(THRICE)
    monkeypatch.setattr(
        "zipc.inspect.TimingProcess", lambda _: Timer(start_ms=start_ms, product_ms=1)
    )
    shapes = parse_input_shapes("x:2x8")
    (site,) = inspect_model(f"{tmp_path}/nets.py:net", input_shapes=shapes)["sites"]
    assert site["calls"] == 3
    assert site["latency_share"] == pytest.approx(1)


def test_the_latency_of_a_network_with_an_input_of_any_name_is_measured(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(THRICE)
    found = inspect_model(f"{tmp_path}/nets.py:net", input_shapes=parse_input_shapes("x:2x8"))
    assert (found["latency_ms"] or 0) > 0, found["notes"]


def test_where_a_part_comes_out_slower_than_the_whole_there_are_no_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noisy(Timer):
        def load(self, model: bytes, **_: object) -> Any:
            self.start_ms += 1  # every graph later is slower
            return super().load(model)

    (tmp_path / "nets.py").write_text(THRICE)
    monkeypatch.setattr("zipc.inspect.TimingProcess", lambda _: Noisy(start_ms=0, product_ms=0))
    found = inspect_model(f"{tmp_path}/nets.py:net", input_shapes=parse_input_shapes("x:2x8"))
    assert [site["latency_share"] for site in found["sites"]] == [None]
    assert any("no shares of the latency" in note for note in found["notes"])


def test_shares_of_the_time_are_none_where_nothing_is_measured(bare: Path) -> None:
    found = inspect_model(str(bare), measure=False)
    assert found["latency_ms"] is None
    assert {site["latency_share"] for site in found["sites"]} == {None}


def test_a_model_that_cannot_be_exported_is_inspected_without_times(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **rest: object) -> None:
        raise UnsupportedModel("no such operator")

    monkeypatch.setattr("zipc.inspect.export_dense", refuse)
    found = inspect_model(str(bare))
    assert len(found["sites"]) == 4
    assert found["latency_ms"] is None
    assert any("no such operator" in note for note in found["notes"])


def test_what_is_left_alone_has_a_path_and_a_reason(bare: Path) -> None:
    found = inspect_model(str(bare), measure=False, exclude=["*attention*"])
    alone = {part["path"]: part["reason"] for part in found["left_alone"]}
    assert alone["encoder.layer.1.attention.self"] == "excluded by --include/--exclude"
    assert {site["kind"] for site in found["sites"]} == {"ffn"}


def test_command_line_prints_one_json_document_about_a_model(bare: Path, run: Run) -> None:
    code, out, _ = run("inspect", str(bare), "--format", "json")
    assert code == 0
    document = json.loads(out)
    assert len(document["sites"]) == 4
    assert all(set(part) == {"path", "reason"} for part in document["left_alone"])


def test_command_line_inspects_a_model_of_the_users_own_file(tmp_path: Path, run: Run) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))\n"
        "def bad(): raise ValueError('out of luck')\n"
    )
    flags = ("--input-shapes", "input:2x8", "--format", "json")
    code, out, _ = run("inspect", f"{tmp_path}/nets.py:net", *flags)
    assert code == 0
    document = json.loads(out)
    assert document["inputs"] == ["input"]
    assert document["input_shapes"] == {"input": ["batch", 8]}
    assert document["outputs"] == ["output"]
    assert document["max_length"] is None
    assert [site["units"] for site in document["sites"]] == [16]
    code, out, err = run("inspect", f"{tmp_path}/nets.py:bad", *flags)
    assert code == 2
    message = json.loads(out)["error"]["message"]
    assert "nets.py:bad, called without arguments, raised ValueError: out of luck" in message
    assert "nets.py, line 3, in bad" in message
    assert "Traceback" not in err


def test_what_torch_export_does_not_follow_is_traced_by_torch_fx_and_said(
    tmp_path: Path, run: Run
) -> None:
    (tmp_path / "nets.py").write_text(BRANCHES)
    words = ("inspect", f"{tmp_path}/nets.py:net", "--no-latency", "--input-shapes", "x:1x16")
    _, out, err = run(*words, "--format", "json")
    found = json.loads(out)
    assert [site["units"] for site in found["sites"]] == [32]
    assert any("traced by torch.fx" in note for note in found["notes"])
    assert "def forward" not in err


def test_folder_that_is_neither_model_nor_output_is_refused(tmp_path: Path, run: Run) -> None:
    code, _, err = run("inspect", str(tmp_path))
    assert code == 2
    assert "is not a finished compile" in err
    assert "Traceback" not in err


def test_onnx_file_gives_opset_ops_parameters_and_integer_products(tmp_path: Path) -> None:
    path = tmp_path / "product.onnx"
    onnx.save(quantized_product(), path)
    found = inspect_onnx(path)
    assert found["opset"] == {"ai.onnx": 20}
    assert found["ops"] == {"DynamicQuantizeLinear": 1, "MatMulInteger": 1}
    assert found["parameters"] == 4 * 8
    assert found["integer_products"] == 1
    assert found["sparsity_2:4"] == {
        "weights": 1,
        "eligible": 0,
        "conforming": 0,
        "dense": [],
        "not_eligible": [{"weight": "w", "reason": "4 input channels are no multiple of 32"}],
    }
    assert found["inputs"] == {"x": ["rows", 4]}
    assert found["size_mb"] == path.stat().st_size / 1e6


@pytest.mark.parametrize("content", [b"", b"not a graph"])
def test_file_that_is_no_graph_is_one_message(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises((UsageError, ExportMismatch), match=r"model\.onnx"):
        inspect_onnx(path)


def test_public_names_are_there_and_importing_zipc_needs_no_torch() -> None:
    assert {name for name in zipc.__all__ if callable(getattr(zipc, name))} == set(zipc.__all__)
    code = "import sys, zipc; zipc.Request(model='m'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = zipc.nothing


def quantized_product() -> onnx.ModelProto:
    """x as U8 by dynamic quantisation, times a constant S8 matrix."""
    weight = numpy_helper.from_array(np.ones((4, 8), dtype=np.int8), "w")
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", 8])],
        initializer=[weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
