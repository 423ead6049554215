"""The shell script that builds and times the engine on the device, with TensorRT's own trtexec."""

from __future__ import annotations

import onnx

from zipc.core.types import PairedTiming, Workload
from zipc.exporters.tensorrt.profiles import Shape, profiles

# TensorRT 11 knows no other typing than the graph's, and times with CUDA graphs, spinning and
# without transfers unless told otherwise; TensorRT 10 has to be told.
SCRIPT = """#!/bin/sh
# Builds model.engine from model.onnx with trtexec and times it: GPU compute, without transfers.
# {expected}
# Inputs: {inputs}
# TensorRT 10.3 to 11.4. Before timing on a Jetson: sudo nvpmodel -m 0 && sudo jetson_clocks
set -eu
cd "$(dirname "$0")"
command -v trtexec >/dev/null || PATH="$PATH:/usr/src/tensorrt/bin"
command -v trtexec >/dev/null || {{ echo "trtexec, of TensorRT, is not on PATH" >&2; exit 2; }}
version='s/.*TensorRT v\\([0-9]*\\)[0-9]\\{{4\\}}\\].*/\\1/p'
major=$(trtexec --help 2>&1 | sed -n "$version" | head -n 1)
case "$major" in
10) typing="--stronglyTyped --useCudaGraph --useSpinWait --noDataTransfers" ;;
11) typing="" ;;
*) echo "trtexec is of TensorRT ${{major:-unknown}}; this graph is for 10 and 11" >&2; exit 2 ;;
esac
exec trtexec --onnx=model.onnx --saveEngine=model.engine $typing --sparsity=enable \\
    --timingCacheFile=timing.cache{shapes} \\
    --warmUp=500 --duration=10 --percentile=50,90,99 --exportTimes=times.json "$@"
"""


def build_script(model: bytes, workload: Workload, timing: PairedTiming) -> str:
    """The text of build.sh for an emitted graph.

    Raises:
        UsageError: the workload does not say how large an input is.
    """
    found = profiles(onnx.load_from_string(model), workload)
    low, high = timing.ci95
    flags = {
        "minShapes": {n: p.least for n, p in found.items()},
        "optShapes": {n: p.most for n, p in found.items()},
        "maxShapes": {n: p.most for n, p in found.items()},
    }
    open_axes = any(p.least != p.most for p in found.values())
    shapes = "".join(
        f" \\\n    --{flag}={','.join(f'{n}:{_sizes(s)}' for n, s in sizes.items())}"
        for flag, sizes in flags.items()
    )
    return SCRIPT.format(
        expected=f"Expected: {timing.speedup:.2f}x of reference.onnx, 95 % {low:.2f} to {high:.2f}",
        inputs=", ".join(f"{n} {_sizes(p.most)}" for n, p in found.items()),
        shapes=shapes if open_axes else "",
    )


def _sizes(shape: Shape) -> str:
    return "x".join(map(str, shape))
