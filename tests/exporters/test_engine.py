"""Builders of engines. TensorRT itself cannot be installed here: its package and its trtexec are
played by files that answer in its formats, so that what is tested is what zipc makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from zipc.core.engine_options import EngineOptions
from zipc.core.errors import EngineFailed, UsageError
from zipc.core.types import Workload
from zipc.exporters.tensorrt import driver, engine
from zipc.exporters.tensorrt.driver import Gpu
from zipc.exporters.tensorrt.engine import (
    Engine,
    Limits,
    build_engine,
    choose_builder,
    run_limited,
)
from zipc.exporters.tensorrt.readback import read_back

A10 = Gpu("NVIDIA A10", "sm86")
LOG = [
    "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b, c",
    "(Sparsity) Chose 1 layer(s) using sparse tactics: a",
    "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: first, second",
    "(Sparsity) Chose 2 layer(s) using sparse tactics: first, second",
    "Total Activation Memory: 3000000",
    "Total Weights Memory: 2000000 bytes",
]


def graph() -> onnx.ModelProto:
    """A convolution in fp16, a map in INT8, a map in fp16 and one in fp32."""
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "conv.w"], ["c"], name="conv"),
        node("Flatten", ["c"], ["f"], name="flatten"),
        node("QuantizeLinear", ["f", "scale"], ["q"], name="quantise"),
        node("DequantizeLinear", ["q", "scale"], ["d"], name="dequantise"),
        node("DequantizeLinear", ["first.w", "scale"], ["dw"], name="weight"),
        node("MatMul", ["d", "dw"], ["h"], name="first"),
        node("MatMul", ["h", "second.w"], ["m"], name="second"),
        node("Cast", ["m"], ["w"], name="cast", to=single),
        node("MatMul", ["w", "third.w"], ["y"], name="third"),
    ]
    arrays = {
        "conv.w": np.zeros((4, 4, 1, 1), np.float16),
        "first.w": np.zeros((16, 8), np.int8),
        "second.w": np.zeros((8, 8), np.float16),
        "third.w": np.zeros((8, 8), np.float32),
        "scale": np.array(0.1, np.float16),
    }
    return helper.make_model(
        helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("x", half, ["batch", 4, 2, 2])],
            [helper.make_tensor_value_info("y", single, ["batch", 8])],
            [numpy_helper.from_array(a, n) for n, a in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
    )


def tensor(datatype: str) -> dict[str, Any]:
    return {
        "Name": "t",
        "Location": "Device",
        "Dimensions": [8, 16],
        "Format/Datatype": datatype,
    }


def layer_info(*, first: str = "Int8", second: str = "Half", tactic: str = "") -> str:
    """What the inspector writes at detailed verbosity: a convolution under TensorRT 8 and earlier
    10s, kernels of its newer compiler, a reformat that only carries the name on."""
    layers = [
        {
            "Name": "conv.w + conv",
            "LayerType": "CaskConvolution",
            "Inputs": [tensor("Thirty-two wide channel vectorized row major FP16 format")],
            "Outputs": [tensor("Row major linear FP16 format")],
            "ParameterType": "Convolution",
            "Weights": {"Type": "Half", "Count": 16},
            "Bias": {"Type": "Float", "Count": 4},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc",
            "TacticValue": "0x3e2b881168d9689d",
        },
        {
            "Name": "__myl_Quan_myl0_1",
            "LayerType": "kgen",
            "Inputs": [tensor("Half")],
            "Outputs": [tensor("Int8")],
            "TacticName": "__myl_Quan_0xcd2b",
            "Metadata": "[ONNX Layer: quantise]",
        },
        {
            "Name": "first_myl0_2",
            "LayerType": "gemm",
            "Inputs": [tensor(first), tensor(first)],
            "Outputs": [tensor("Half")],
            "TacticName": tactic,
            "Metadata": "[ONNX Layer: first]\x1f[ONNX Layer: dequantise]",
        },
        {
            "Name": "second_myl0_3",
            "LayerType": "gemm",
            "Inputs": [tensor(second), tensor(second)],
            "Outputs": [tensor("Half")],
            "TacticName": "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n",
            "Metadata": "[ONNX Layer: second]\x1e[ONNX Layer: cast]",
        },
    ]
    return json.dumps({"Layers": layers, "Bindings": ["x", "y"]})


# --- reading back -------------------------------------------------------------------------------


def test_an_engine_tells_what_each_product_computes_in() -> None:
    found = read_back(layer_info(), LOG, graph(), {})
    assert dict(found.products) == {"fp16": 2, "int8": 1}
    assert found.unseen == 1  # no layer names the third
    assert (found.sparse_found, found.sparse_chosen) == (2, 2)  # of the last pass
    assert found.memory_mb == 5.0
    assert not found.short_of_memory
    assert "sparse kernels chosen for 2 layers of 2" in str(found)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"first": "Half"}, r"1 of 4 products, first node 'first', mlp of net, in fp16 .* int8"),
        ({"first": "Float"}, r"in fp32 where the graph has int8"),
        ({"second": "Row major linear FP32"}, r"node 'second' in fp32 where the graph has fp16"),
    ],
)
def test_lost_precision_is_an_error_that_names_the_place(
    changed: dict[str, str], says: str
) -> None:
    with pytest.raises(EngineFailed, match=says):
        read_back(layer_info(**changed), LOG, graph(), {"first": "mlp of net"})


def test_an_int8_kernel_that_rounds_its_own_input_counts_as_int8() -> None:
    kernel = "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x128x64"
    assert read_back(layer_info(first="Half", tactic=kernel), [], graph(), {}).products["int8"] == 1


def test_what_the_builder_did_not_say_is_not_made_up() -> None:
    found = read_back(layer_info(), [], graph(), {})
    assert (found.sparse_found, found.memory_mb) == (None, None)
    assert found.sparse == {"second"}
    assert "1 products on sparse kernels" in str(found)
    assert "could have them" not in str(found)


def test_tactics_dropped_for_want_of_memory_are_told() -> None:
    line = "Skipping tactic 4 due to insufficient memory: Cuda failure: out of memory"
    assert "memory ran out" in str(read_back(layer_info(), [line], graph(), {}))


@pytest.mark.parametrize("told", ['{"Layers": ["conv", "first"]}', '{"Layers": []}', "", "{"])
def test_an_engine_without_details_is_an_error(told: str) -> None:
    with pytest.raises(EngineFailed, match="does not tell"):
        read_back(told, LOG, graph(), {})


# --- which builder ------------------------------------------------------------------------------


def present(patch: pytest.MonkeyPatch, *, gpu: Gpu | None, packages: tuple[str, ...] = ()) -> None:
    patch.setattr(engine, "local_gpu", lambda: gpu)
    patch.setattr(engine, "_trtexec", lambda: None)
    patch.setattr(
        engine.importlib.util, "find_spec", lambda name: object() if name in packages else None
    )


@pytest.mark.parametrize(
    ("gpu", "packages", "chosen"),
    [
        (A10, ("tensorrt", "tensorrt_rtx"), "trt"),
        (None, ("tensorrt", "tensorrt_rtx"), "rtx"),
        (Gpu("T4", "sm75"), ("tensorrt", "tensorrt_rtx"), "rtx"),
        (A10, ("tensorrt_rtx",), "rtx"),
    ],
)
def test_auto_takes_the_first_that_builds_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, packages: tuple[str, ...], chosen: str
) -> None:
    present(monkeypatch, gpu=gpu, packages=packages)
    assert choose_builder("auto", "sm86") == chosen


@pytest.mark.parametrize(
    ("asked", "gpu", "packages", "says"),
    [
        ("rtx", None, ("tensorrt_rtx",), r"does not build for sm87.*build\.sh"),
        ("trt", A10, ("tensorrt",), r"NVIDIA A10, sm86\), not sm87.*build\.sh"),
        ("trt", None, ("tensorrt",), "no driver for it"),
        ("trt", A10, (), "not installed"),
        ("trtexec", A10, (), "neither on PATH"),
        ("auto", A10, (), "not installed.*neither on PATH.*does not build for sm87"),
    ],
)
def test_a_builder_that_cannot_do_it_says_why(
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    gpu: Gpu | None,
    packages: tuple[str, ...],
    says: str,
) -> None:
    present(monkeypatch, gpu=gpu, packages=packages)
    with pytest.raises(UsageError, match=says):
        choose_builder(asked, "sm87")


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError()))
    assert driver._ask() is None


def test_a_driver_that_crashes_takes_nothing_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "crash.py").write_text("import os; os.kill(os.getpid(), 11)")
    monkeypatch.setattr(driver, "__file__", str(tmp_path / "crash.py"))
    assert driver.local_gpu() is None


# --- building -----------------------------------------------------------------------------------

PACKAGE = """
import enum, json, pathlib

__version__ = "10.16.2"
PLAY = json.loads(pathlib.Path(__file__).with_name("play.json").read_text())

class ILogger:
    ERROR, INTERNAL_ERROR, VERBOSE = "error", "internal", "verbose"
    def __init__(self): pass

class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1

class BuilderFlag(enum.IntEnum):
    REFIT = 3
    SPARSE_WEIGHTS = 8
    VERSION_COMPATIBLE = 11

class ProfilingVerbosity(enum.IntEnum):
    DETAILED = 2

class LayerInformationFormat(enum.IntEnum):
    JSON = 1

class Error:
    def node_name(self): return "second"
    def node_operator(self): return "MatMul"
    def desc(self): return "no such thing"

class OnnxParser:
    def __init__(self, network, log): assert network == 1 << 1
    num_errors = 1
    def parse_from_file(self, path): return not PLAY.get("refuse")
    def get_error(self, index): return Error()

class Cache:
    def __init__(self, held): self.held = held
    def serialize(self): return self.held or b"timings of 10.16.2"

class Config:
    profiling_verbosity = None
    builder_optimization_level = None
    def __init__(self): self.flags = set()
    def set_flag(self, flag): self.flags.add(flag.name)
    def add_optimization_profile(self, profile): assert profile.shapes["x"][0] == [1, 4, 2, 2]
    def create_timing_cache(self, held): return Cache(held)
    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.held not in (b"", b"timings of 10.16.2"):
            return False
        self.cache = cache
        return True
    def get_timing_cache(self): return self.cache

class Profile:
    def __init__(self): self.shapes = {}
    def set_shape(self, name, *shapes): self.shapes[name] = shapes

class Builder:
    def __init__(self, log): self.log = log
    def create_network(self, flags): return flags
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        assert config.profiling_verbosity == ProfilingVerbosity.DETAILED
        asked = {"flags": sorted(config.flags), "level": config.builder_optimization_level}
        pathlib.Path(__file__).with_name("asked.json").write_text(json.dumps(asked))
        for line in PLAY["log"]:
            self.log.log("verbose", line)
        if PLAY.get("fails"):
            self.log.log("error", PLAY["fails"])
            return None
        return b"plan"

class Runtime:
    def __init__(self, log): self.log = log
    def deserialize_cuda_engine(self, plan):
        if PLAY.get("foreign"):
            self.log.log("error", PLAY["foreign"])
            return None
        return self
    def create_engine_inspector(self): return self
    def get_engine_information(self, style): return PLAY["layers"]
"""
TRTEXEC = """#!{python}
import json, pathlib, sys
play = json.loads(pathlib.Path(__file__).with_name("play.json").read_text())
print("&&&& RUNNING TensorRT.trtexec [TensorRT v" + play.get("version", "101602") + "] [b1] #")
if sys.argv[1] == "--help":
    sys.exit(0)
flags = dict(f.removeprefix("--").partition("=")[::2] for f in sys.argv[1:])
pathlib.Path(__file__).with_name("called.json").write_text(json.dumps(flags))
for line in play["log"]:
    print("[11/27/2026-12:00:00] [V] [TRT]", line)
if play.get("fails"):
    pathlib.Path(flags["saveEngine"]).write_bytes(b"part")
    print("[11/27/2026-12:00:00] [E] [TRT]", play["fails"])
    sys.exit(1)
pathlib.Path(flags["saveEngine"]).write_bytes(b"plan")
pathlib.Path(flags["timingCacheFile"]).write_bytes(b"timings of 10.16.2")
if not play.get("foreign"):
    pathlib.Path(flags["exportLayerInfo"]).write_text(play["layers"])
else:
    print("[11/27/2026-12:00:00] [E]", play["foreign"])
"""


@pytest.fixture(params=["trt", "trtexec"])
def builder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A builder of TensorRT's on a machine with an A10; `play` says what it does."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "tensorrt.py").write_text(PACKAGE)
    (site / "trtexec").write_text(TRTEXEC.format(python=sys.executable))
    (site / "trtexec").chmod(0o755)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("PATH", str(site), prepend=":")
    monkeypatch.setattr(engine, "local_gpu", lambda: A10)
    return str(request.param)


def build(builder: str, folder: Path, options: str = "", **play: Any) -> Engine:
    plays = {"log": LOG, "layers": layer_info()} | play
    (folder / "site/play.json").write_text(json.dumps(plays))
    return build_engine(
        graph().SerializeToString(),
        builder=builder,
        compute_capability="sm86",
        workload=Workload(input_shapes={"x": (8, 4, 2, 2)}),
        options=EngineOptions.parse(options),
        places={"second": "mlp of net"},
        cache=folder / "cache",
    )


def test_an_engine_of_the_gpu_here_is_read_back(builder: str, tmp_path: Path) -> None:
    built = build(builder, tmp_path)
    assert built.plan == b"plan"
    assert "TensorRT 10.16.2 for sm86" in str(built)
    assert "1 products in int8, 2 products in fp16" in str(built)
    assert "sparse kernels chosen for 2 layers of 2" in str(built)


def test_an_engine_is_built_to_be_what_was_asked_for(builder: str, tmp_path: Path) -> None:
    build(builder, tmp_path, "refit,version-compatible,level=5")
    if builder == "trt":
        asked = json.loads((tmp_path / "site/asked.json").read_text())
        flags = ["REFIT", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE"]
        assert asked == {"flags": flags, "level": 5}
        build(builder, tmp_path)
        asked = json.loads((tmp_path / "site/asked.json").read_text())
        assert asked == {"flags": ["SPARSE_WEIGHTS"], "level": None}
    else:
        called = json.loads((tmp_path / "site/called.json").read_text())
        assert {"refit", "versionCompatible", "sparsity"} <= set(called)
        assert called["builderOptimizationLevel"] == "5"
        build(builder, tmp_path)
        called = json.loads((tmp_path / "site/called.json").read_text())
        assert not {"refit", "versionCompatible", "builderOptimizationLevel"} & set(called)


def test_timings_of_kernels_are_kept_for_the_next_build(builder: str, tmp_path: Path) -> None:
    build(builder, tmp_path)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.read_bytes() == b"timings of 10.16.2"
    assert "NVIDIA_A10-sm86" in kept.name
    assert build(builder, tmp_path).notes == ()


@pytest.mark.parametrize("builder", ["trt"], indirect=True)
def test_timings_of_another_tensorrt_are_not_used_and_that_is_told(
    builder: str, tmp_path: Path
) -> None:
    build(builder, tmp_path)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"timings of 8.6")
    assert "made anew" in str(build(builder, tmp_path))
    assert kept.read_bytes() == b"timings of 10.16.2"


def test_lost_precision_ends_the_build_and_keeps_no_timings(builder: str, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="lost precision"):
        build(builder, tmp_path, layers=layer_info(second="Float"))
    assert not (tmp_path / "cache").exists()


def test_a_builder_that_fails_names_the_node_and_its_module(builder: str, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match=r"MatMul node 'second', mlp of net: .*no kernel"):
        build(builder, tmp_path, fails="Error Code 10: second: no kernel was found")


def test_an_engine_that_cannot_be_read_back_is_an_error(builder: str, tmp_path: Path) -> None:
    foreign = "The engine plan file is generated on an incompatible device, expecting compute 8.6"
    with pytest.raises(EngineFailed, match="incompatible device"):
        build(builder, tmp_path, foreign=foreign)


@pytest.mark.parametrize("builder", ["trt"], indirect=True)
def test_the_parser_of_the_package_names_the_node(builder: str, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match=r"MatMul node 'second', mlp of net: no such thing"):
        build(builder, tmp_path, refuse=True)


@pytest.mark.parametrize("builder", ["trtexec"], indirect=True)
def test_trtexec_is_told_what_it_needs(builder: str, tmp_path: Path) -> None:
    build(builder, tmp_path)
    called = json.loads((tmp_path / "site/called.json").read_text())
    assert {"stronglyTyped", "skipInference", "verbose"} <= set(called)
    assert called["sparsity"] == "enable"
    assert called["profilingVerbosity"] == "detailed"
    assert called["minShapes"] == "x:1x4x2x2"
    assert called["optShapes"] == called["maxShapes"] == "x:8x4x2x2"
    build(builder, tmp_path, version="110400")
    assert "stronglyTyped" not in json.loads((tmp_path / "site/called.json").read_text())


@pytest.mark.parametrize("builder", ["trtexec"], indirect=True)
def test_a_trtexec_of_another_tensorrt_is_refused(builder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"TensorRT 8\.6\.1"):
        build(builder, tmp_path, version="8601")


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "limits", "says"),
    [
        ("import time; time.sleep(60)", Limits(0.3, 2000), r"more than 0\.3 s"),
        ("x = bytearray(300 << 20); import time; time.sleep(60)", Limits(30.0, 100), "100 MB"),
        ("import os; os.kill(os.getpid(), 11)", Limits(30.0, 2000), "crashed .SIGSEGV."),
    ],
    ids=["hangs", "memory", "crash"],
)
def test_a_builder_that_goes_wrong_is_stopped_and_says_how(
    tmp_path: Path, code: str, limits: Limits, says: str
) -> None:
    command = [sys.executable, "-c", code]
    with pytest.raises(EngineFailed, match=says):
        run_limited(command, log=tmp_path / "log", limits=limits)


@pytest.mark.parametrize("builder", ["trt"], indirect=True)
def test_a_package_that_does_not_import_is_told(builder: str, tmp_path: Path) -> None:
    (tmp_path / "site/tensorrt.py").write_text("raise ImportError('libnvonnxparser.so.11')")
    with pytest.raises(EngineFailed, match=r"ended with 1.*libnvonnxparser"):
        build(builder, tmp_path)
