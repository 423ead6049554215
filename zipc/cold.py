"""Prices with cold caches: what a part costs in a model that streams its weights from memory.

A decode step reads every weight once for one row, and takes as long as that reading. Where all
weights together do not fit the last cache, a part finds none of its own there when its turn comes;
timed alone, run after run, it would find them all, and seem to be up to three times as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from zipc.core.types import Runner, Workload
from zipc.exporters.onnx_export import serialised
from zipc.profiler.device import Device
from zipc.profiler.timing import interleave, warm_up
from zipc.targets import ON_CPU

UNKNOWN_CACHE = 32 << 20  # bytes of a last cache whose size the system does not tell
TIMES = 2  # as much as the last cache is what streams from memory beyond doubt
LEAST = 4 << 20  # bytes of weights below which what a run takes beside reading them shows
STREAMED, CACHED = 0.9, 0.7  # time per byte, relative to memory, of weights that come from it and
# of those that do not; what a cache holds in part is priced as if it were there
RUNS = 7
COLUMNS = 4096


def cache_filler(device: Device, workload: Workload, model_bytes: int) -> bytes | None:
    """A graph to run before each timed run, so that it finds its weights in memory; None where a
    deployed model of so many bytes would find them in the cache, or does not wait for them."""
    if workload.past_length is None or device.kind != "measured" or device.runtime not in ON_CPU:
        return None
    most = min(TIMES * last_cache(device.fingerprint().get("caches", [])), model_bytes)
    return least_filler(partial(device.timer().load, workload=workload), most)


def least_filler(load: Callable[[bytes], Runner], most: int) -> bytes | None:
    """Of products that read `most` bytes, or half as many, and so on, the smallest that takes as
    long per byte as the largest; None where none is much faster.

    What a system tells of its last cache does not say what of it a program gets: a virtual machine
    that was told of 480 MB had a hundred.
    """
    memory = filler = None
    size = most
    while size >= LEAST:
        product = product_of_one_row(size)
        per_byte = _ms(load(product)) / size
        memory = memory or per_byte
        if per_byte < CACHED * memory:
            return filler
        if per_byte > STREAMED * memory:
            filler = product
        size //= 2
    return None


def _ms(runner: Runner) -> float:
    """The least of some runs: others on the machine only slow it down."""
    warm_up(runner, max_runs=3)
    (times,) = interleave([runner], rounds=RUNS, untimed=0)
    return min(times)


def last_cache(told: list[str]) -> int:
    """Bytes of the last of some caches, which are told as `L3 32768K`."""
    units = {"K": 10, "M": 20, "G": 30}
    size = told[-1].split()[-1] if told else ""
    if size[:-1].isdigit() and size[-1] in units:
        return int(size[:-1]) << units[size[-1]]
    return UNKNOWN_CACHE


def product_of_one_row(size: int) -> bytes:
    """A graph that reads `size` bytes of weights once, which runtimes fill in when they load it."""
    rows = max(size // (4 * COLUMNS), 1)
    half = numpy_helper.from_array(np.array([0.5], np.float32))
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["weight"], value=half),
        helper.make_node("MatMul", ["filler", "weight"], ["filled"]),
    ]
    graph = helper.make_graph(
        nodes,
        "filler",
        [helper.make_tensor_value_info("filler", TensorProto.FLOAT, [1, rows])],
        [helper.make_tensor_value_info("filled", TensorProto.FLOAT, [1, COLUMNS])],
        [numpy_helper.from_array(np.array([rows, COLUMNS]), "shape")],
    )
    return serialised(graph)
