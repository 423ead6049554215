"""What trtexec, TensorRT's own tool, is told to build and time engines on the device."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import onnx

from zipc.core.engine_options import BY_DEFAULT, EngineOptions
from zipc.core.types import PairedTiming, Target, Workload
from zipc.exporters.tensorrt.profiles import Profile, profile_texts, profiles, sizes

# TensorRT 11 knows no other typing than the graph's, and times with CUDA graphs, spinning and
# without transfers unless told otherwise; TensorRT 10 has to be told.
TYPING = {"10": ["--stronglyTyped"], "11": []}
TIMING = {"10": ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"], "11": []}
SPARSE = "--sparsity=enable"
WARM_UP = "--warmUp=500"
MEASURES = "GPU compute, without transfers, by CUDA graph, spinning"
ORIN_MODES = {"orin": 0, "orin:50w": 3, "orin:30w": 2}  # of an AGX Orin, for nvpmodel -m
JETSON = """
# Jetson: JetPack 6.1 and 6.2 have TensorRT 10.3, JetPack 7.2 has 10.16, and 11.4.1 needs JetPack
# 7.2.2. Before timing, {mode}
# sudo jetson_clocks. Boards of 8 GB: stop what else runs, for tactics that find no memory are
# dropped without an error; the script says if that happened."""
SCRIPT = """#!/bin/sh
# Builds engines of model.onnx and reference.onnx with trtexec, times them in turns (GPU compute,
# without transfers) and prints the speedup, then the one below. Flags are passed on to the builds:
#     sh build.sh --builderOptimizationLevel=5
# BUILDS=3 sh build.sh builds anew as often, without a timing cache: what differs is luck.
# {expected}
# Inputs: {inputs}
# TensorRT 10.3 to 11.4.{jetson}
set -eu
cd "$(dirname "$0")"
command -v trtexec >/dev/null || PATH="$PATH:/usr/src/tensorrt/bin"
command -v trtexec >/dev/null || {{ echo "trtexec, of TensorRT, is not on PATH" >&2; exit 2; }}
version=$(trtexec --help 2>&1 | sed -n 's/.*TensorRT v\\([0-9]*\\)\\].*/\\1/p' | head -n 1)
case "$version" in
{majors}
*)
    echo "trtexec is of TensorRT ${{version:-unknown}}; these graphs are for 10 and 11" >&2
    exit 2
    ;;
esac
builds=${{BUILDS:-1}}
cache="--timingCacheFile=timing.$version.cache"
[ "$builds" -eq 1 ] || cache=""

build() {{
    name=$1; shift
    echo "building $name.engine ($name.log)"
    trtexec --onnx="$name.onnx" --saveEngine="$name.engine.new" $typing $cache{shapes} \\
        {sparse} --profilingVerbosity=detailed --exportLayerInfo="$name.layers.json" \\
        --verbose --skipInference{options} "$@" >"$name.log" 2>&1 ||
        {{ tail -n 20 "$name.log" >&2; exit 1; }}
    mv "$name.engine.new" "$name.engine"
    sed -n 's/.*\\((Sparsity) [A-Z][a-z]* [0-9]* layer(s)[a-z ]*\\).*/\\1/p' "$name.log" | tail -n 2
    ! grep -qi 'out of memory\\|outofmemory\\|nvmap' "$name.log" ||
        echo "memory ran out: tactics were dropped, and $name.engine may be slow" >&2
}}

median() {{
    ms=$(trtexec --loadEngine="$1.engine" $timing{run_shapes} {warm_up} --duration=3 \\
        --percentile=50,90,99 --exportTimes="$1.times.json" 2>&1 |
        sed -n 's/.*GPU Compute Time:.* median = \\([0-9.]*\\) ms.*/\\1/p')
    echo "${{ms:-0}}"
}}

if command -v nvpmodel >/dev/null; then nvpmodel -q || true; fi
turn=0
while [ "$turn" -lt "$builds" ]; do
    turn=$((turn + 1))
    build model "$@"
    if [ -e reference.onnx ]; then build reference "$@"; fi
    for _ in 1 2 3 4 5; do
        if [ -e reference.onnx ]; then echo "$(median model) $(median reference)"
        else echo "$(median model)"; fi
    done | awk -v build="$turn of $builds" '
        !($1 > 0) || (NF > 1 && !($2 > 0)) {{ failed = 1 }}
        {{ a[NR] = $1; b[NR] = $2; r[NR] = NF > 1 ? $2 / $1 : 0 }}
        function middle(x,   i, j, t) {{
            for (i = 1; i < NR; i++) for (j = i + 1; j <= NR; j++)
                if (x[j] < x[i]) {{ t = x[i]; x[i] = x[j]; x[j] = t }}
            return x[(NR + 1) / 2]
        }}
        END {{
            if (failed) {{ print "trtexec gave no times; run it by hand" > "/dev/stderr"; exit 1 }}
            printf "build %s: model %.4f ms", build, middle(a)
            if (r[1]) printf ", reference %.4f ms, speedup %.3fx", middle(b), middle(r)
            if (r[1]) printf " (%.3f to %.3f over %d turns)", r[1], r[NR], NR
            print ""
        }}'
done
echo {told}
"""


def build_script(
    model: bytes,
    *,
    target: Target,
    workload: Workload,
    timing: PairedTiming,
    ms: float,
    known: str,
    options: EngineOptions = BY_DEFAULT,
) -> str:
    """The text of build.sh for an emitted graph and its reference.

    `ms` is what the graph takes, and `known` says how that and the speedup are known; `options` are
    of both engines.

    Raises:
        UsageError: the workload does not say how large an input is.
    """
    found = profiles(onnx.load_from_string(model), workload)
    low, high = timing.ci95
    majors = (
        f'{m}????) typing="{" ".join(TYPING[m])}" timing="{" ".join(TIMING[m])}" ;;' for m in TYPING
    )
    best = profile_texts(found).get("opt")
    expected = (
        f"{known}: {ms:.3g} ms, {timing.speedup:.2f}x of reference.onnx, "
        f"95 % {low:.2f} to {high:.2f}"
    )
    return SCRIPT.format(
        expected=expected,
        told=shlex.quote(expected),
        inputs=", ".join(f"{n} {sizes(p.most)}" for n, p in found.items()),
        jetson=_jetson(target),
        majors="\n".join(majors),
        sparse=SPARSE,
        options="".join(f" {flag}" for flag in options.flags),
        warm_up=WARM_UP,
        shapes="".join(f" \\\n        {flag}" for flag in shape_flags(found)),
        run_shapes="" if best is None else f" --shapes={best}",
    )


def recipe(model: bytes, workload: Workload) -> dict[str, Any]:
    """The same for `profiler.trtexec`: flags of building and timing, by major version of TensorRT.

    Raises:
        UsageError: the workload does not say how large an input is.
    """
    return {
        "measures": MEASURES,
        "shapes": shape_flags(profiles(onnx.load_from_string(model), workload)),
        "build": {major: [*flags, SPARSE] for major, flags in TYPING.items()},
        "time": {major: [*flags, WARM_UP] for major, flags in TIMING.items()},
    }


def shape_flags(found: Mapping[str, Profile]) -> list[str]:
    """The profile of the engine; none where no axis is open."""
    return [f"--{end}Shapes={text}" for end, text in profile_texts(found).items()]


def _jetson(target: Target) -> str:
    if target.sheet is None or target.sheet.anchors != "orin":
        return ""
    mode = "choose the power mode with sudo nvpmodel -m, then"
    if target.name in ORIN_MODES:
        mode = f"sudo nvpmodel -m {ORIN_MODES[target.name]} ({target.mode or 'MAXN'}), then"
    return JETSON.format(mode=mode)
