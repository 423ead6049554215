"""A whole network of convolutions in INT8: values stay integers from one operator to the next.

A single convolution in INT8 between floats gains little, since its input and output are converted;
a network that is converted once at each end gains as much as a linear map does. The graph is
written by ONNX Runtime's own quantiser as QuantizeLinear and DequantizeLinear around standard
operators (symmetric S8 weights per output channel, U8 activations per tensor), which ONNX Runtime
replaces by integer kernels when it loads the graph under default options.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.helper import make_node
from onnx.numpy_helper import from_array, to_array

from zipc.core.errors import ExportMismatch
from zipc.core.quiet import hush
from zipc.core.types import Workload
from zipc.exporters.graph import live
from zipc.profiler.runners.onnxruntime import PROVIDERS, default_feeds, one_line

Batch = Mapping[str, np.ndarray[Any, Any]]
RANGES = ("minmax", "percentile")  # how the range of an activation is chosen
SUMS = ("Add", "Sum")
FLOAT_OUTPUTS = ("Gemm", "MatMul")  # their integer kernels give floats at no cost
PERCENTILE = 99.99
ROWS = 256  # that ranges are taken from
WARNINGS, ERRORS = 2, 3  # severities of ONNX Runtime's log; warnings are its default
MEMORY = 1 << 29  # bytes of activations held at once


@dataclass(frozen=True, slots=True)
class IntegerBody:
    """How a graph is brought to INT8: on which batches, and how ranges are chosen from them.

    Without batches ranges come from made-up inputs, which is enough to time a graph.
    """

    workload: Workload
    reduce_range: bool = False  # 7 bits: where U8 x S8 dot products saturate in 16 bits
    ranges: str = "minmax"
    exact_sums: bool = False  # sums, and convolutions that read the inputs, in floats: less error
    # and less speed
    row_bytes: int = 0  # of all activations of one row, which a percentile wants at once; 0 where
    # rows of a batch cannot be taken apart
    batches: Sequence[Batch] = field(default=())

    @property
    def weight_limit(self) -> int:
        """The integer that ONNX Runtime's quantiser maps the largest weight of a channel to."""
        return 64 if self.reduce_range else 127

    def calibrated_on(self, batches: Sequence[Batch]) -> IntegerBody:
        """With ranges from some rows of these batches; those of another size are left out."""
        shapes = [[value.shape for value in batch.values()] for batch in batches]
        same = [b for b, shape in zip(batches, shapes, strict=True) if shape == shapes[0]]
        rows = max(1, shapes[0][0][0])
        return replace(self, batches=tuple(same[: max(1, ROWS // rows)]))

    def _batches(self) -> Sequence[Batch]:
        """The batches that ranges are taken from, as many rows as there is memory for."""
        if self.ranges == "minmax":
            return self.batches
        rows = next(iter(self.batches[0].values())).shape[0]
        fit = MEMORY // max(self.row_bytes, 1)
        if fit >= rows:
            return self.batches[: fit // rows]
        return [{name: value[: max(fit, 1)] for name, value in self.batches[0].items()}]

    def emit(self, model: bytes, *, part: bool = False) -> bytes:
        """The graph in INT8. A `part` of the network has inputs of its own: they are made up.

        Raises:
            ExportMismatch: ONNX Runtime's quantiser does not take the graph.
        """
        from onnxruntime import quantization as q
        from onnxruntime.quantization.registry import QDQRegistry

        method = q.CalibrationMethod.MinMax
        if self.ranges == "percentile":
            method = q.CalibrationMethod.Percentile
        with tempfile.TemporaryDirectory() as folder, hush(), _no_advice():
            try:
                folded, made_up = _folded(model, Path(folder) / "folded.onnx", self.workload)
                if not self.exact_sums:
                    _shifts_as_maps_(folded)
                kept = _first_maps(folded) if self.exact_sums else []
                q.quantize_static(
                    folded,
                    str(Path(folder) / "integer.onnx"),
                    _reader([made_up] if part or not self.batches else self._batches()),
                    quant_format=q.QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=self.reduce_range,
                    weight_type=q.QuantType.QInt8,
                    activation_type=q.QuantType.QUInt8,
                    calibrate_method=method,
                    op_types_to_quantize=[
                        op for op in QDQRegistry if not (self.exact_sums and op in SUMS)
                    ],
                    nodes_to_exclude=kept,
                    extra_options={
                        "CalibPercentile": PERCENTILE,
                        "OpTypesToExcludeOutputQuantization": list(FLOAT_OUTPUTS),
                    },
                )
            except Exception as error:  # the quantiser raises many unrelated types
                raise ExportMismatch(
                    f"ONNX Runtime {ort.__version__} cannot bring the graph to INT8: "
                    f"{one_line(error)}. Use --numerics fp32."
                ) from error
            made = onnx.load(Path(folder) / "integer.onnx")
            if self.exact_sums:
                _sum_floats_(made)
            return _standard(made, like=model)


def _folded(model: bytes, path: Path, workload: Workload) -> tuple[onnx.ModelProto, Batch]:
    """The graph with every BatchNormalization folded into its convolution, and inputs for it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=PROVIDERS)
    return onnx.load(path), default_feeds(session, workload)


def _first_maps(folded: onnx.ModelProto) -> list[str]:
    """Names of the convolutions that read the inputs of the graph."""
    inputs = {entry.name for entry in folded.graph.input}
    return [n.name for n in folded.graph.node if n.op_type == "Conv" and n.input[0] in inputs]


def _shifts_as_maps_(folded: onnx.ModelProto) -> None:
    """Let every sum of channels with a constant each be a convolution of each channel by itself.

    The quantiser leaves a sum with constants, as a removed block is, between floats, and the sum
    before it too: a block that goes would save nothing.
    """
    constants = {t.name: to_array(t) for t in folded.graph.initializer}
    channels = _channels(folded)
    for node in folded.graph.node:
        given = [name for name in node.input if name not in constants]
        if node.op_type != "Add" or len(given) != 1 or given[0] not in channels:
            continue
        (shift,) = (constants[name] for name in node.input if name in constants)
        count = channels[given[0]]
        if shift.shape not in ((count, 1, 1), (1, count, 1, 1)):
            continue
        ones, bias = f"{node.output[0]}.ones", f"{node.output[0]}.shift"
        folded.graph.initializer.append(from_array(np.ones((count, 1, 1, 1), np.float32), ones))
        folded.graph.initializer.append(from_array(shift.reshape(-1), bias))
        inputs, outputs = [given[0], ones, bias], list(node.output)
        node.CopyFrom(make_node("Conv", inputs, outputs, node.name, group=count))


def _channels(model: onnx.ModelProto) -> dict[str, int]:
    """How many channels the images in a graph have, by value."""
    known = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*known.value_info, *known.input)
    }
    return {name: shape[1] for name, shape in shapes.items() if len(shape) == 4 and shape[1]}


def _sum_floats_(made: onnx.ModelProto) -> None:
    """Let every sum read what it adds before that is rounded, but for results of convolutions,
    which run on integers only where their result is rounded."""
    graph = made.graph
    producers = {name: n for n in graph.node for name in n.output}

    def behind(name: str, op_type: str) -> str | None:
        found = producers.get(name)
        return found.input[0] if found is not None and found.op_type == op_type else None

    for node in graph.node:
        for i, name in enumerate(node.input if node.op_type in SUMS else ()):
            rounded = behind(name, "DequantizeLinear")
            exact = behind(rounded, "QuantizeLinear") if rounded is not None else None
            if exact in producers and producers[exact].op_type not in ("Conv", "ConvTranspose"):
                node.input[i] = exact
    kept = live(list(graph.node), [entry.name for entry in graph.output])
    del graph.node[:]
    graph.node.extend(kept)


def _standard(made: onnx.ModelProto, *, like: bytes) -> bytes:
    """The graph with the header of another one: only the operator sets in use are declared."""
    header = onnx.load_from_string(like)
    used = {"" if node.domain == "ai.onnx" else node.domain for node in made.graph.node}
    kept = [entry for entry in made.opset_import if entry.domain in used]
    del made.opset_import[:], made.metadata_props[:]
    made.opset_import.extend(kept)
    made.producer_name, made.producer_version = header.producer_name, header.producer_version
    made.metadata_props.extend(header.metadata_props)
    return bytes(made.SerializeToString())


def _reader(batches: Sequence[Batch]) -> Any:
    """The batches as the quantiser wants to be given them."""
    from onnxruntime.quantization import CalibrationDataReader

    left = iter(batches)
    reader = type("Reader", (CalibrationDataReader,), {"get_next": lambda _: next(left, None)})
    return reader()


class _no_advice:
    """The quantiser logs that a model should be preprocessed, which it has been, and its sessions
    log what they clean up."""

    def __enter__(self) -> None:
        self._before = logging.root.level
        logging.root.setLevel(logging.ERROR)
        ort.set_default_logger_severity(ERRORS)

    def __exit__(self, *_: object) -> None:
        logging.root.setLevel(self._before)
        ort.set_default_logger_severity(WARNINGS)
