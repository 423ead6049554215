"""A trtexec without a GPU: it prints and writes what those of TensorRT 10 and 11 do.

The forms are those of trtexec's own source (samples/common: sampleReporting.cpp, sampleEngines.cpp,
sampleDevice.h) and of logs in its issues. An engine is the ONNX file again; a run of it takes a
millisecond for each ten kilobytes. One that is "sparse" skips zeros.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

VERSIONS = {"10": "v100300", "11": "v110400] [b106", "8": "v8601"}
UNKNOWN = {"10": {"noCudaGraph", "includeDataTransfers"}, "11": {"stronglyTyped"}, "8": set()}
REFUSED = """\
{at} [E] [TRT] ModelImporter.cpp:949: While parsing node number 3 [Tile -> "/Tile_output_0"]:
{at} [E] [TRT] ModelImporter.cpp:950: --- Begin node ---
op_type: "Tile"
{at} [E] [TRT] ModelImporter.cpp:951: --- End node ---
{at} [E] [TRT] ModelImporter.cpp:954: ERROR: ModelImporter.cpp:195 In function parseNode:
[6] Invalid Node - /Tile
ITensor::getDimensions: Error Code 4: Internal Error (/OneHot cannot compute a shape tensor)
{at} [E] Failed to parse onnx file
{at} [I] Finished parsing network model. Parse time: 0.0483808
{at} [E] Parsing model failed
{at} [E] Failed to create engine from model or file.
{at} [E] Engine set up failed"""
SHORT = (
    "[TRT] Tactic Device request: 5127MB Available: 3450MB. Device memory is insufficient to use "
    "tactic."
)
SUMMARY = "GPU Compute Time: min = 3.12671 ms, max = 3.15479 ms, mean = 3.14068 ms"
AT = "[11/27/2026-12:00:00]"


def install(folder: Path, *, major: str = "10", trouble: str = "") -> Path:
    """Write `trtexec` to a folder; its calls are kept in `calls` there, one JSON list a line."""
    program = folder / "trtexec"
    words = f"{Path(__file__).absolute()} {folder} {major} '{trouble}' \"$@\""
    bare = f"exec {sys.executable} -I -S {words}"  # starts in a third of the time
    built = f"exec {sys.executable} {words}"
    program.write_text(f'#!/bin/sh\ncase "$*" in *--saveEngine*) {built};; *) {bare};; esac\n')
    program.chmod(0o755)
    return folder / "calls"


def python_beside(folder: Path, *, first: str = ":") -> str:
    """A Python to name with --host-python: it finds that trtexec, and keeps its files there.

    It has no packages, as a board's, zipc least of all. The shell does `first` before it starts.
    """
    python, bare = folder / "python3", f"{sys.executable} -I -S"
    python.write_text(
        f'#!/bin/sh\n{first}\nPATH="{folder}:$PATH" TMPDIR="{folder}" exec {bare} "$@"\n'
    )
    python.chmod(0o755)
    return str(python)


def install_gpu(folder: Path, *, name: str, capability: str) -> None:
    """Write an `nvidia-smi` to a folder, which knows a GPU."""
    program = folder / "nvidia-smi"
    answers = f"*compute_cap*) echo '{capability}';; *name*) echo '{name}, 550.54';; *) exit 2;;"
    program.write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
    program.chmod(0o755)


def main(folder: Path, major: str, trouble: str, *words: str) -> None:
    given = {name[2:]: value for name, _, value in (word.partition("=") for word in words)}
    banner = f"TensorRT.trtexec [TensorRT {VERSIONS[major]}] # trtexec {' '.join(words)}"
    print(f"&&&& RUNNING {banner}", flush=True)
    if "help" in given:
        print("=== Model Options ===")
        return
    with (folder / "calls").open("a") as log:
        log.write(json.dumps(words) + "\n")
    for flag in UNKNOWN[major] & given.keys():
        fail(banner, f"{AT} [E] Unknown option: --{flag}")
    if trouble == "no gpu":
        print("Cuda failure: no CUDA-capable device is detected", file=sys.stderr)
        sys.exit(1)
    if "saveEngine" in given:
        build(given, folder, trouble, banner)
    if "exportTimes" in given:
        measure(given, folder, trouble)
    print(f"&&&& PASSED {banner}")


def fail(banner: str, *lines: str) -> NoReturn:
    print("\n".join([*lines, f"&&&& FAILED {banner}"]))
    sys.exit(1)


def build(given: dict[str, str], folder: Path, trouble: str, banner: str) -> None:
    if trouble == "refused":
        fail(banner, REFUSED.format(at=AT))
    if trouble == "no room":
        fail(banner, f"{AT} [E] Saving engine to file failed.", f"{AT} [E] Engine set up failed")
    if trouble == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "slow build":
        (folder / "building").write_text(str(os.getpid()))
        time.sleep(600)
    if trouble == "short of memory":
        print(f"{AT} [W] {SHORT}")
    model, made = Path(given["onnx"]).read_bytes(), (folder / "calls").read_text()
    spare = len(model) // 10 * (made.count("--skipInference") // 2) if trouble == "luck" else 0
    Path(given["saveEngine"]).write_bytes(model + bytes(spare if len(model) < 1e5 else 0))
    Path(given["exportLayerInfo"]).write_text(layers(model))
    print(f"{AT} [I] Engine built in 8.25 sec.")


def layers(model: bytes) -> str:
    """What the inspector says of the products of a graph."""
    import onnx

    graph = onnx.load_from_string(model).graph
    integers = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    wide = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    wide |= {
        o for n in graph.node if n.op_type == "Cast" and n.attribute[0].i == 1 for o in n.output
    }
    found = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        read = "Int8" if integers.issuperset(node.input[:2]) else "Half"
        read = "Float" if wide.intersection(node.input[:2]) else read
        found.append(
            {
                "Name": f"{node.name}_myl0",
                "LayerType": "gemm",
                "Inputs": [{"Name": "t", "Dimensions": [8], "Format/Datatype": read}],
                "TacticName": "sm87_xmma_gemm_f16f16_f16f32_f32_tn_n",
                "Metadata": f"[ONNX Layer: {node.name}]",
            }
        )
    return json.dumps({"Layers": found, "Bindings": []})


def measure(given: dict[str, str], folder: Path, trouble: str) -> None:
    engine = Path(given["loadEngine"]).read_bytes()
    skipped = engine.count(0) if trouble == "sparse" else 0
    compute = (len(engine) - skipped) / 1e4
    done = (folder / "calls").read_text().count("--exportTimes")
    if trouble == "hot" and done > 4:
        compute *= 1.5
    runs, at = [], float(given["warmUp"])
    for number in range(int(given["iterations"])):
        took = compute * (1, 1.004, 0.997, 1.002, 0.999)[(number + done) % 5]
        names = ("Enq", "H2d", "Compute", "D2h")
        fields = {f"{edge}{name}Ms": at for name in names for edge in ("start", "end")}
        fields |= {"endComputeMs": at + took, "startD2hMs": at + took, "endD2hMs": at + took}
        fields |= {"h2dMs": 0.0, "computeMs": took, "d2hMs": 0.0, "latencyMs": took}
        runs.append("{ " + ", ".join(f'"{n}" : {v:g}' for n, v in fields.items()) + " }\n")
        at += took
    text = "[\n  " + ", ".join(runs) + "]\n"
    kept = len(text) // 2 if trouble == "cut" else len(text)
    Path(given["exportTimes"]).write_text(text[:kept])
    print(f"{AT} [I] === Performance summary ===\n{AT} [I] {SUMMARY}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
