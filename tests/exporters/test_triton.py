"""Repositories for Triton: a client that knows only config.pbtxt can call the model beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from zipc.core.errors import UsageError
from zipc.core.types import Workload
from zipc.exporters.triton import repository

ENCODER = """
<ir_version: 8, opset_import: ["": 17]>
encoder (int64[batch, sequence] ids, float[batch, sequence] mask)
    => (float[batch, sequence, 1] states, float[batch] score)
<int64[1] last = {2}, int64[1] inner = {1}>
{ x = Cast <to = 1> (ids)  y = Mul (x, mask)  states = Unsqueeze (y, last)
  score = ReduceSum <keepdims = 0> (y, inner) }
"""
FIXED = """
<ir_version: 8, opset_import: ["": 17]>
fixed (float[2, 3] x) => (float[2, 3] y) { y = Relu (x) }
"""
TYPES = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_FP16": np.float16}
# of Triton's model_config.proto: field, number, type, message of its own, repeated
SCHEMA = {
    "Reshape": [("shape", 1, "int64", "", True)],
    "Tensor": [
        ("name", 1, "string", "", False),
        ("data_type", 2, "enum", "DataType", False),
        ("reshape", 5, "message", "Reshape", False),
    ],
    "Group": [("kind", 4, "enum", "Kind", False), ("count", 2, "int32", "", False)],
    "Batching": [],
    "Entry": [("key", 1, "string", "", False), ("value", 2, "string", "", False)],
    "Accelerator": [
        ("name", 1, "string", "", False),
        ("parameters", 2, "message", "Entry", True),
    ],
    "Accelerators": [("gpu_execution_accelerator", 1, "message", "Accelerator", True)],
    "Optimization": [("execution_accelerators", 6, "message", "Accelerators", False)],
    "Value": [("string_value", 1, "string", "", False)],
    "Parameter": [("key", 1, "string", "", False), ("value", 2, "message", "Value", False)],
    "Config": [
        ("name", 1, "string", "", False),
        ("platform", 2, "string", "", False),
        ("max_batch_size", 4, "int32", "", False),
        ("input", 5, "message", "Tensor", True),
        ("output", 6, "message", "Tensor", True),
        ("instance_group", 7, "message", "Group", True),
        ("dynamic_batching", 11, "message", "Batching", False),
        ("optimization", 12, "message", "Optimization", False),
        ("parameters", 14, "message", "Parameter", True),
        ("backend", 17, "string", "", False),
    ],
}


@pytest.fixture(scope="module")
def config_type() -> Any:
    """The message type of a config.pbtxt, as far as these files use it."""
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    for name, values in (
        ("DataType", ["TYPE_INVALID", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32"]),
        ("Kind", ["KIND_AUTO", "KIND_GPU", "KIND_CPU"]),
    ):
        kind = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            kind.value.add(name=value, number=number)
    field_type = descriptor_pb2.FieldDescriptorProto
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, number, kind_name, own, repeated in fields:
            message.field.add(
                name=field,
                number=number,
                type=getattr(field_type, f"TYPE_{kind_name.upper()}"),
                type_name=f".t.{own}" if own else None,
                label=field_type.LABEL_REPEATED if repeated else field_type.LABEL_OPTIONAL,
            )
        if name == "Tensor":
            message.field.add(
                name="dims",
                number=4,
                type=field_type.TYPE_INT64,
                label=field_type.LABEL_REPEATED,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Config"))


def parsed(files: dict[str, bytes], config_type: Any) -> Any:
    (text,) = (content for path, content in files.items() if path.endswith("config.pbtxt"))
    return text_format.Parse(text.decode(), config_type())


def named(kind: Any, value: Any) -> type[np.generic]:
    return TYPES[kind.DESCRIPTOR.fields_by_name["data_type"].enum_type.values[value].name]


@pytest.mark.parametrize(
    ("text", "workload", "batch", "rows"),
    [
        (ENCODER, Workload(batch_size=8, sequence_length=16), 8, (1, 8)),
        (FIXED, Workload(input_shapes={"x": (2, 3)}), 0, (0,)),
    ],
    ids=["batched", "fixed"],
)
def test_a_client_that_knows_only_the_config_can_call_the_model(
    text: str, workload: Workload, batch: int, rows: tuple[int, ...], config_type: Any
) -> None:
    model = onnx.parser.parse_model(text).SerializeToString()
    files = repository("a b", model, workload=workload, tensorrt=False)
    assert set(files) == {"triton/a_b/config.pbtxt", "triton/a_b/1/model.onnx"}
    config = parsed(files, config_type)
    assert (config.name, config.backend, config.max_batch_size) == ("a_b", "onnxruntime", batch)
    assert config.HasField("dynamic_batching") == (batch > 0)
    session = ort.InferenceSession(
        files["triton/a_b/1/model.onnx"], providers=["CPUExecutionProvider"]
    )
    for count in rows:
        lead = [count] if batch else []
        feeds = {
            i.name: np.ones(lead + [5 if d < 0 else d for d in i.dims], dtype=named(i, i.data_type))
            for i in config.input
        }
        outputs = session.run([o.name for o in config.output], feeds)
        for told, array in zip(config.output, outputs, strict=True):
            sizes = told.reshape.shape if told.HasField("reshape") else told.dims
            assert array.dtype == named(told, told.data_type)
            assert list(array.shape) == lead + [5 if d < 0 else d for d in sizes]
            assert len(told.dims) > 0  # the server refuses an output without


def test_threads_are_those_that_were_timed(config_type: Any) -> None:
    model = onnx.parser.parse_model(ENCODER).SerializeToString()
    config = parsed(
        repository("m", model, workload=Workload(threads=3), tensorrt=False), config_type
    )
    assert [(p.key, p.value.string_value) for p in config.parameters] == [
        ("intra_op_thread_count", "3")
    ]


def test_under_tensorrt_the_graph_keeps_its_types_and_its_profile(config_type: Any) -> None:
    model = onnx.parser.parse_model(ENCODER).SerializeToString()
    workload = Workload(batch_size=8, sequence_length=16)
    config = parsed(repository("m", model, workload=workload, tensorrt=True), config_type)
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    given = {p.key: p.value for p in accelerator.parameters}
    assert accelerator.name == "tensorrt"
    assert given["trt_profile_min_shapes"] == "ids:1x1,mask:1x1"
    assert given["trt_profile_max_shapes"] == "ids:8x16,mask:8x16"
    assert "precision_mode" not in given  # it would make the network weakly typed
    assert not config.parameters


def test_an_engine_of_tensorrt_is_served_as_a_plan(config_type: Any) -> None:
    model = onnx.parser.parse_model(ENCODER).SerializeToString()
    files = repository("m", model, workload=Workload(), tensorrt=True, plan=b"engine")
    assert files["triton/m/1/model.plan"] == b"engine"
    config = parsed(files, config_type)
    assert (config.platform, config.backend) == ("tensorrt_plan", "")
    assert not config.HasField("optimization")


def test_a_type_that_the_server_has_not_is_told_with_the_name_of_the_value() -> None:
    text = FIXED.replace("float[2, 3] x", "double[2, 3] x").replace("(float[2", "(double[2")
    model = onnx.parser.parse_model(text).SerializeToString()
    with pytest.raises(UsageError, match=r"'x', DOUBLE"):
        repository("m", model, workload=Workload(input_shapes={"x": (2, 3)}), tensorrt=False)
