"""How large the values of a graph get on data: what decides whether fp16 can hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from zipc.exporters.graph import OnnxGraph
from zipc.exporters.specialise import Edit, Int8Weights, specialise
from zipc.exporters.tensorrt.lower import finite_masks_

Feeds = Mapping[str, np.ndarray[Any, Any]]


class _Floats:
    """An `Emitter` that leaves the graph in fp32, with the masks that TensorRT gets."""

    def quantise_(self, graph: OnnxGraph, maps: Mapping[str, Int8Weights], *, part: bool) -> None:
        pass

    def finish_(self, graph: OnnxGraph) -> None:
        finite_masks_(graph)


def maxima(dense: OnnxGraph, edit: Edit, batches: Sequence[Feeds]) -> dict[str, float]:
    """Largest magnitude of every float on the batches, by name; infinity where one is not a number.

    The edit is one in floats.
    """
    graph = specialise(dense, edit, emitter=_Floats())
    proto = graph.to_proto()
    made = {o for n in proto.graph.node for o in n.output if o}
    names = [n for n in made if graph.types.get(n) == TensorProto.FLOAT]
    held = {o.name for o in proto.graph.output}
    proto.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names if n not in held
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps all names
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = [i.name for i in session.get_inputs()]
    found = dict.fromkeys(names, 0.0)
    for batch in batches:
        values = session.run(names, {n: batch[n] for n in given})
        for name, value in zip(names, values, strict=True):
            largest = float(np.abs(value).max(initial=0.0))
            found[name] = max(found[name], np.inf if np.isnan(largest) else largest)
    return found
