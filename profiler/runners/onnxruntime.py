"""ONNX Runtime on the CPU: one inference, timed, under default session options."""

from __future__ import annotations

import ast
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import onnxruntime as ort

from zipc.core.errors import ExportMismatch, UsageError
from zipc.core.types import Workload

PROVIDERS = ["CPUExecutionProvider"]
_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
MAX_ID = 8  # random token ids stay below the size of any vocabulary (those of letters have ~30)

_DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class OnnxRuntimeRunner:
    """Times one graph; a `Runner`.

    Sessions keep ONNX Runtime's defaults except for the thread counts. With more than one thread
    the pool does not spin: an idle spinning pool steals the core from the session timed next.

    Raises:
        ExportMismatch: ONNX Runtime cannot load or run the graph.
        UsageError: an input of the graph is missing from `feeds`.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        workload: Workload,
        feeds: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._name = str(model) if isinstance(model, Path) else "graph in memory"
        self._options = session_options(workload)
        self._session = _load(model, options=self._options, name=self._name)
        if feeds is None:
            self._feeds = default_feeds(self._session, workload)
        else:
            self._feeds = self._select(feeds)

    @property
    def session_options(self) -> dict[str, Any]:
        """What the session was opened with, for the manifest."""
        return {**self._options, "providers": list(PROVIDERS)}

    def run(self) -> float:
        """Do one inference and return its milliseconds."""
        try:
            start = perf_counter_ns()
            self._session.run(None, self._feeds)
            return (perf_counter_ns() - start) / 1e6
        except Exception as error:  # ONNX Runtime's errors share no base
            raise self._cannot_run(error) from error

    def outputs(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on `feeds`; entries the graph has no input for are ignored."""
        names = [output.name for output in self._session.get_outputs()]
        try:
            values = self._session.run(names, self._select(feeds))
        except Exception as error:  # ONNX Runtime's errors share no base
            raise self._cannot_run(error) from error
        return dict(zip(names, values, strict=True))

    def _select(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = [node.name for node in self._session.get_inputs()]
        missing = [name for name in wanted if name not in feeds]
        if missing:
            raise UsageError(
                f"{self._name} needs the inputs {missing}, which were not given; "
                f"given: {sorted(feeds)}."
            )
        return {name: feeds[name] for name in wanted}

    def _cannot_run(self, error: Exception) -> ExportMismatch:
        return ExportMismatch(
            f"ONNX Runtime {ort.__version__} cannot run {self._name}: {one_line(error)}. "
            "A sequence may be longer than the graph takes: give a smaller --sequence-length."
        )


def one_line(error: Exception, *, longest: int = 300) -> str:
    """What ONNX Runtime says, without line breaks, and without the middle where it is long.

    It begins with the node and ends with the reason; between them lie signatures of its own code.
    """
    text = " ".join(str(error).split()).rstrip(". ")
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def default_feeds(session: Any, workload: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    """Make one input per graph input, from its name, type and shape.

    An input that the workload names has exactly the shape given there. Elsewhere, an axis has the
    size the workload has for its name, also in an expression of names; under any other name a
    symbolic first axis is the batch, and the rest the sequence. The values of an input depend on
    its name and the seed only, so two graphs are timed on the same data.

    Raises:
        UsageError: an input has a type that is not a plain tensor of numbers, or the workload does
            not say how large it is.
    """
    feeds: dict[str, np.ndarray] = {}
    for node in session.get_inputs():
        if node.type not in _DTYPES:
            raise UsageError(f"Cannot make data for input {node.name!r} of type {node.type}.")
        shape = _shape(node.name, node.shape, workload)
        rng = np.random.default_rng([seed, zlib.crc32(node.name.encode())])
        feeds[node.name] = _values(node.name, shape, dtype=np.dtype(_DTYPES[node.type]), rng=rng)
    return feeds


def _shape(name: str, dims: Sequence[int | str | None], workload: Workload) -> tuple[int, ...]:
    given = workload.input_shapes.get(name)
    if given is None:
        return tuple(_size(name, dim, axis, workload) for axis, dim in enumerate(dims))
    fixed = [n for n, dim in zip(given, dims, strict=False) if isinstance(dim, int) and n != dim]
    if len(given) != len(dims) or fixed:
        raise UsageError(
            f"The workload gives input {name!r} the shape {list(given)}, but the graph takes "
            f"{list(dims)}. Compile the model for that shape with --input-shapes."
        )
    return given


def _size(name: str, dim: int | str | None, axis: int, workload: Workload) -> int:
    if isinstance(dim, int):
        return dim
    size = None if dim is None else _evaluate(dim, workload.axes)
    if size is None:
        size = workload.batch_size if axis == 0 else workload.sequence_length
    if size is None:
        raise UsageError(
            f"Axis {axis} of input {name!r} ({dim or 'unnamed'}) is open, and the workload "
            f"({workload}) does not say how large it is. Give --input-shapes."
        )
    return size


def _evaluate(expression: str, axes: Mapping[str, int]) -> int | None:
    """A size such as "batch", "4*batch" or "past + 1"; None where a name in it is unknown."""
    try:
        return _value(ast.parse(expression, mode="eval").body, axes)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


def _value(node: ast.expr, axes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return axes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, axes), _value(node.right, axes))
    raise KeyError(ast.dump(node))


def _values(
    name: str, shape: tuple[int, ...], *, dtype: np.dtype[Any], rng: np.random.Generator
) -> np.ndarray:
    if np.issubdtype(dtype, np.floating) and "mask" not in name:
        return rng.standard_normal(shape).astype(dtype)
    if "mask" in name:
        return np.ones(shape, dtype)
    if name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
    if name.endswith("ids") and name != "token_type_ids":
        return rng.integers(1, MAX_ID, shape).astype(dtype)
    return np.zeros(shape, dtype)


def session_options(workload: Workload) -> dict[str, Any]:
    """What a session for this workload is opened with, by ONNX Runtime's names."""
    options: dict[str, Any] = {
        "intra_op_num_threads": workload.threads,
        "inter_op_num_threads": 1,
    }
    if workload.threads > 1:
        options["session.intra_op.allow_spinning"] = "0"
    return options


def _load(model: Path | bytes, *, options: Mapping[str, Any], name: str) -> Any:
    if isinstance(model, Path) and not model.is_file():
        raise UsageError(f"There is no ONNX file at {model}.")
    opened = ort.SessionOptions()
    opened.log_severity_level = 4  # errors are raised, and need no second voice
    for key, value in options.items():
        if key.startswith("session."):
            opened.add_session_config_entry(key, value)
        else:
            setattr(opened, key, value)
    source = str(model) if isinstance(model, Path) else model
    try:
        return ort.InferenceSession(source, opened, providers=PROVIDERS)
    except Exception as error:  # ONNX Runtime's errors share no base
        raise ExportMismatch(
            f"ONNX Runtime {ort.__version__} cannot load {name}: {one_line(error)}. "
            "Export it again, or install the ONNX Runtime it was made for."
        ) from error
