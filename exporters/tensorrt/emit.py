"""The graph for TensorRT 10.3 to 11.4: strongly typed, fp16, INT8 as explicit Q/DQ.

Only what the oldest of them parses is written: operators up to opset 20, symmetric S8, scales of
the type of the values they scale. One file serves all, for TensorRT 11 knows no other typing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zipc.exporters.finish import fuse_attention_
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.specialise import Edit, Int8Weights, specialise
from zipc.exporters.tensorrt.half import half_
from zipc.exporters.tensorrt.lower import lower_
from zipc.exporters.tensorrt.qdq import quantise_, scales_in_half_


def emit(dense: OnnxGraph, edit: Edit, *, maxima: Mapping[str, float]) -> OnnxGraph:
    """A copy of `dense` with the edit applied, as TensorRT takes it. Names and axes stay.

    Inputs and outputs keep their types. `maxima` are the largest magnitudes of values on
    calibration data, by name: operators that read or give more than fp16 holds stay in fp32, and
    `half.kept_in_fp32` lists them.

    Raises:
        ExportMismatch: a map in INT8 is not one that TensorRT quantises, or its range is dynamic or
            not symmetric.
    """
    return specialise(dense, edit, emitter=TensorRt(maxima))


@dataclass(frozen=True, slots=True)
class TensorRt:
    """The `Emitter` for TensorRT; see `emit`."""

    maxima: Mapping[str, float]

    def quantise_(self, graph: OnnxGraph, maps: Mapping[str, Int8Weights], *, part: bool) -> None:
        quantise_(graph, maps)

    def finish_(self, graph: OnnxGraph) -> None:
        lower_(graph)
        scales_in_half_(graph)
        half_(graph, maxima=self.maxima)


class InFloats:
    """The `Emitter` of what is priced and searched: rounded as for TensorRT, in fp32.

    Every expert of a mixture sees all tokens, as in the graph that ships: with tokens gathered for
    each, sizes would depend on values, which no model prices and no CUDA graph holds.
    """

    def quantise_(self, graph: OnnxGraph, maps: Mapping[str, Int8Weights], *, part: bool) -> None:
        quantise_(graph, maps)

    def finish_(self, graph: OnnxGraph) -> None:
        fuse_attention_(graph)


IN_FLOATS = InFloats()
