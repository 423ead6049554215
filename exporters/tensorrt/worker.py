"""Build one engine with TensorRT or TensorRT-RTX, in a process that may crash. Run as a script, by
`engine`.

The folder given holds model.onnx, request.json and perhaps timing.cache; answer.json, and the plan
if all went well, are written beside them. TensorRT's own engines are read back into layers.json.
Nothing of zipc is imported: this process is small and starts fast.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    trt = importlib.import_module(request["package"])
    errors: list[str] = []
    told: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]  # the packages have no types
        def log(self, severity: Any, message: str) -> None:
            wrong = severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            (errors if wrong else told).append(message)

    answer: dict[str, Any] = {"version": trt.__version__, "parser": [], "notes": []}
    log = Log()
    plan = _build(trt, folder, request, log=log, answer=answer)
    if plan is not None:
        (folder / "plan").write_bytes(bytes(plan))
        if request["package"] == "tensorrt":
            runtime = trt.Runtime(log)
            runtime.engine_host_code_allowed = True  # which version-compatible engines bring along
            engine = runtime.deserialize_cuda_engine(bytes(plan))
            if engine is not None:
                json_format = trt.LayerInformationFormat.JSON
                layers = engine.create_engine_inspector().get_engine_information(json_format)
                (folder / "layers.json").write_text(layers)
    (folder / "answer.json").write_text(json.dumps(answer | {"log": errors, "told": told}))


def _build(
    trt: Any, folder: Path, request: dict[str, Any], *, log: Any, answer: dict[str, Any]
) -> Any | None:
    """The serialised engine; None, and in `answer` what the parser refused, where there is none."""
    builder = trt.Builder(log)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(folder / "model.onnx")):
        for error in (parser.get_error(i) for i in range(parser.num_errors)):
            found = {"node": error.node_name(), "operator": error.node_operator()}
            answer["parser"].append({**found, "message": error.desc()})
        return None
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)  # where weights are 2:4; elsewhere idle
    for flag in request["flags"]:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if request["level"] is not None:
        config.builder_optimization_level = request["level"]
    profile = builder.create_optimization_profile()
    for name, (least, most) in request["profiles"].items():
        profile.set_shape(name, least, most, most)
    config.add_optimization_profile(profile)
    if request["package"] == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, request["compute_capability"].upper())
        config.set_compute_capability(capability, 0)
        return builder.build_serialized_network(network, config)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    kept = folder / "timing.cache"
    cache = config.create_timing_cache(kept.read_bytes() if kept.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        answer["notes"].append("its timing cache was of another TensorRT or GPU and is made anew")
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    kept.write_bytes(bytes(config.get_timing_cache().serialize()))
    return plan


if __name__ == "__main__":
    main(Path(sys.argv[1]))
