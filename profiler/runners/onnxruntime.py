"""ONNX Runtime on the CPU: one inference, timed, under default session options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from zipc.core.errors import ExportMismatch, UsageError
from zipc.core.types import Workload
from zipc.profiler.agent import PROVIDERS, one_inference, open_session, values
from zipc.profiler.facts import one_line
from zipc.profiler.runners.inputs import shape_of

_DTYPES: Mapping[str, str] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
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
            return one_inference(self._session, self._feeds)
        except Exception as error:  # ONNX Runtime's errors share no base
            raise self._cannot_run(error) from error

    def outputs(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on `feeds`; entries the graph has no input for are ignored."""
        names = [output.name for output in self._session.get_outputs()]
        try:
            found = self._session.run(names, self._select(feeds))
        except Exception as error:  # ONNX Runtime's errors share no base
            raise self._cannot_run(error) from error
        return dict(zip(names, found, strict=True))

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


def default_feeds(session: Any, workload: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    """Make one input per graph input, from its name, type and shape.

    The values of an input depend on its name and the seed only, so two graphs are timed on the
    same data.

    Raises:
        UsageError: an input has a type that is not a plain tensor of numbers, or the workload does
            not say how large it is; see `inputs.shape_of`.
    """
    feeds: dict[str, np.ndarray] = {}
    for node in session.get_inputs():
        if node.type not in _DTYPES:
            raise UsageError(f"Cannot make data for input {node.name!r} of type {node.type}.")
        shape = shape_of(node.name, node.shape, workload)
        feeds[node.name] = values(node.name, shape, _DTYPES[node.type], seed)
    return feeds


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
    source = str(model) if isinstance(model, Path) else model
    try:
        return open_session(source, options)
    except Exception as error:  # ONNX Runtime's errors share no base
        raise ExportMismatch(
            f"ONNX Runtime {ort.__version__} cannot load {name}: {one_line(error)}. "
            "Export it again, or install the ONNX Runtime it was made for."
        ) from error


__all__ = ["PROVIDERS", "OnnxRuntimeRunner", "default_feeds", "one_line", "session_options"]
