"""Prices with cold caches: what a part costs in a model that streams its weights from memory.

A decode step reads every weight once for one row, and takes as long as that reading. Where all
weights together do not fit the last cache, a part finds none of its own there when its turn comes;
timed alone, run after run, it would find them all, and seem to be up to three times as fast.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from zipc.core.types import Workload
from zipc.exporters.onnx_export import serialised
from zipc.profiler.device import Device
from zipc.targets import ON_CPU

UNKNOWN_CACHE = 32 << 20  # bytes of a last cache whose size the system does not tell
TIMES = 2  # as much as the last cache is read to throw out what it holds
COLUMNS = 4096


def cache_filler(device: Device, workload: Workload, model_bytes: int) -> bytes | None:
    """A graph to run before each timed run, so that it finds its weights in memory; None where a
    deployed model of so many bytes would find them in the cache, or does not wait for them."""
    if workload.past_length is None or device.kind != "measured" or device.runtime not in ON_CPU:
        return None
    cache = last_cache(device.fingerprint().get("caches", []))
    return None if model_bytes <= cache else product_of_one_row(TIMES * cache)


def last_cache(told: list[str]) -> int:
    """Bytes of the last of some caches, which are told as `L3 32768K`."""
    units = {"K": 10, "M": 20, "G": 30}
    size = told[-1].split()[-1] if told else ""
    if size[:-1].isdigit() and size[-1] in units:
        return int(size[:-1]) << units[size[-1]]
    return UNKNOWN_CACHE


def product_of_one_row(size: int) -> bytes:
    """A graph that reads `size` bytes of weights once."""
    weight = np.full((max(size // (4 * COLUMNS), 1), COLUMNS), 0.5, np.float32)
    node = helper.make_node("MatMul", ["filler", "weight"], ["filled"])
    graph = helper.make_graph(
        [node],
        "filler",
        [helper.make_tensor_value_info("filler", TensorProto.FLOAT, [1, len(weight)])],
        [helper.make_tensor_value_info("filled", TensorProto.FLOAT, [1, COLUMNS])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return serialised(graph)
