"""Build one engine with TensorRT-RTX, in a process that may crash. Run as a script, by `engine`.

The folder given holds model.onnx and request.json; answer.json, and the plan if all went well, are
written beside them. Nothing of zipc is imported: this process is small and starts fast.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    import tensorrt_rtx as trt

    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]  # the package has no types
        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                said.append(message)

    request = json.loads((folder / "request.json").read_text())
    answer: dict[str, Any] = {"version": trt.__version__, "parser": [], "log": said}
    plan = _build(folder, request, log=Log(), refused=answer["parser"])
    if plan is not None:
        (folder / "plan").write_bytes(bytes(plan))
    (folder / "answer.json").write_text(json.dumps(answer))


def _build(
    folder: Path, request: dict[str, Any], *, log: Any, refused: list[dict[str, str]]
) -> Any | None:
    """The serialised engine; None, and what the parser refused, where there is none."""
    import tensorrt_rtx as trt

    builder = trt.Builder(log)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(folder / "model.onnx")):
        for error in (parser.get_error(i) for i in range(parser.num_errors)):
            found = {"node": error.node_name(), "operator": error.node_operator()}
            refused.append({**found, "message": error.desc()})
        return None
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    capability = getattr(trt.ComputeCapability, request["compute_capability"].upper())
    config.set_compute_capability(capability, 0)
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)  # where weights are 2:4; elsewhere idle
    profile = builder.create_optimization_profile()
    for name, (least, most) in request["profiles"].items():
        profile.set_shape(name, least, most, most)
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
