"""An ONNX file as it lies on disk: where it is, what it takes, how large it is."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from zipc.core.errors import UsageError


def graph_of(artifact: Path) -> Path:
    """Return the ONNX file of an output folder, or the file itself.

    Raises:
        UsageError: there is no such file.
    """
    path = artifact / "model.onnx" if artifact.is_dir() else artifact
    if not path.is_file():
        raise UsageError(f"There is no ONNX file at {path}. Give a zipc output folder or an .onnx.")
    return path


def inputs_of(path: Path) -> dict[str, str]:
    """Element type of each input by name.

    Raises:
        UsageError: it is no ONNX file.
    """
    graph = _load(path).graph
    stored = {tensor.name for tensor in graph.initializer}  # which may be listed as inputs, too
    return {
        value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        for value in sorted(graph.input, key=lambda value: value.name)
        if value.name not in stored
    }


def bytes_of(graph: Path) -> int:
    """Size of an ONNX file with the files its weights are kept in.

    Raises:
        UsageError: it is no ONNX file, or one of its files is missing.
    """
    model = _load(graph)
    files = {
        graph.parent / ExternalDataInfo(tensor).location
        for tensor in model.graph.initializer
        if uses_external_data(tensor)
    }
    try:
        return sum(path.stat().st_size for path in {graph, *files})
    except OSError as error:
        raise UsageError(f"{graph} needs {error.filename}, which is missing.") from error


def _load(graph: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # protobuf's errors share no base
        raise UsageError(f"{graph} is not an ONNX file: {error}") from error
    if not model.HasField("graph"):
        raise UsageError(f"{graph} is not an ONNX file: it holds no graph.")
    return model
