"""A model repository for NVIDIA's Triton Inference Server: config.pbtxt beside the model.

Field names are those of its model_config.proto, parameters those of its ONNX Runtime backend.
"""

from __future__ import annotations

import json
import re

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from zipc.core.errors import UsageError
from zipc.core.types import Workload
from zipc.exporters.tensorrt.profiles import profile_texts, profiles

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.BOOL: "TYPE_BOOL",
}


def repository(
    name: str, model: bytes, *, workload: Workload, tensorrt: bool, plan: bytes | None = None
) -> dict[str, bytes]:
    """The files of a repository with one model in it, by their paths under "triton".

    `tensorrt`: the graph is for TensorRT, which ONNX Runtime's accelerator of that name builds as
    the server starts; strongly typed, for that is what it does as long as no `precision_mode` is
    given. With a `plan`, an engine by TensorRT, that is served instead.

    Raises:
        UsageError: the server has no name for the type of an input or output.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    proto = onnx.load_from_string(model)
    text = _config(name, proto, workload, tensorrt=tensorrt, built=plan is not None)
    folder = f"triton/{name}"
    held = {f"{folder}/1/model.onnx": model} if plan is None else {f"{folder}/1/model.plan": plan}
    return {f"{folder}/config.pbtxt": text.encode(), **held}


def _config(
    name: str, proto: ModelProto, workload: Workload, *, tensorrt: bool, built: bool
) -> str:
    """Requests are batched, up to the batch that was timed, where all values have that axis."""
    values = (*proto.graph.input, *proto.graph.output)
    first = {dims[0] if (dims := _dims(value)) else None for value in values}
    batched = len(first) == 1 and isinstance(first.pop(), str)
    lines = [
        f"name: {json.dumps(name)}",
        'platform: "tensorrt_plan"' if built else 'backend: "onnxruntime"',
        f"max_batch_size: {_batch(proto, workload) if batched else 0}",
        *(_tensor("input", value, batched=batched) for value in proto.graph.input),
        *(_tensor("output", value, batched=batched) for value in proto.graph.output),
        f"instance_group {{ kind: {'KIND_GPU' if tensorrt else 'KIND_CPU'} count: 1 }}",
    ]
    if batched:
        lines.append("dynamic_batching { }")
    if not tensorrt:
        lines.append(_parameter("intra_op_thread_count", str(workload.threads)))
    elif not built:
        lines.append(_accelerator(proto, workload))
    return "\n".join(lines) + "\n"


def _batch(proto: ModelProto, workload: Workload) -> int:
    return profiles(proto, workload)[proto.graph.input[0].name].most[0]


def _tensor(role: str, value: ValueInfoProto, *, batched: bool) -> str:
    kind = value.type.tensor_type.elem_type
    if kind not in DTYPES:
        raise UsageError(
            f"Triton has no type for {value.name!r}, {TensorProto.DataType.Name(kind)} in ONNX. "
            "Leave --layout out."
        )
    sizes = [-1 if isinstance(d, str) else d for d in _dims(value)[batched:]]
    scalar = " reshape { shape: [ ] }" if not sizes else ""  # the server takes no empty dims
    dims = ", ".join(map(str, sizes or [1]))
    named = json.dumps(value.name)
    return f"{role} {{ name: {named} data_type: {DTYPES[kind]} dims: [ {dims} ]{scalar} }}"


def _dims(value: ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _accelerator(proto: ModelProto, workload: Workload) -> str:
    texts = profile_texts(profiles(proto, workload))
    shapes = {f"trt_profile_{end}_shapes": text for end, text in texts.items()}
    given = {"trt_sparsity_enable": "1", **shapes}
    inner = "".join(
        f" parameters {{ key: {json.dumps(k)} value: {json.dumps(v)} }}" for k, v in given.items()
    )
    return (
        "optimization { execution_accelerators { gpu_execution_accelerator "
        f'{{ name: "tensorrt"{inner} }} }} }}'
    )


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
