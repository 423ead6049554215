"""What a user asks for: every flag of `compile`, `plan` and `profile` as one plain value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from zipc.core.engine_options import EngineOptions
from zipc.core.errors import UsageError
from zipc.core.types import InputSpec, Target, Workload

PATTERNS = ("auto", "2:4", "none")
QUANTIZERS = ("zipc", "modelopt")
DECODING = ("int4-weights",)  # numerics of decode steps: with many rows they are slower than INT8


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The arguments of a compile; `plan` and `profile` read the part they need."""

    model: str
    weights: str | None = None  # safetensors of a model from path/to/file.py:factory
    data: str | None = None
    output: Path | None = None
    target: str = "cpu"
    runtime: str | None = None  # onnxruntime | openvino | torch | auto; None is that of the target
    host: str | None = None  # the board to measure on, as ssh names it; None is this machine
    host_python: str = "python3"
    speedup: float | None = None
    latency_ms: float | None = None
    max_drop: float | None = None  # points of the metric that the fastest artifact may lose on dev
    numerics: str = "auto"  # auto, int8, or a numeric of the target
    pattern: str = "auto"  # auto | 2:4 | none
    quantizer: str = "zipc"  # zipc | modelopt: who chooses INT8 ranges and rounds
    prune: bool = True
    metric: str | None = None
    evaluator: str | None = None  # path/to/file.py:function
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    recover: str = "none"
    effort: str = "default"  # quick | default | extensive
    seed: int = 0
    threads: int | None = None  # None: one, and a speedup must hold by default options too
    batch_size: int = 1
    sequence_length: int | None = None  # 128 or the most the model takes, if it reads sequences
    phase: str = "prefill"  # prefill | decode: a language model reads a prompt, or makes a token
    past_length: int | None = None  # tokens in the cache of a decode step; 128 or the most there is
    input_shapes: tuple[InputSpec, ...] = ()  # whole shapes, of models that read no text
    cache_dir: Path | None = None
    keep_reference: bool = True
    allow_table_mismatch: bool = False
    engine: str | None = None  # auto | trt | trtexec | rtx: what builds one for the target's GPU
    engine_options: str = ""  # refit, version-compatible, level=0 to level=5, with commas
    layout: str | None = None  # "triton": a model repository for that server beside the rest
    require: str | None = None  # "validated": a predicted verdict is a failure too

    def check(self, target: Target) -> None:
        """Refuse what cannot be meant, before anything is loaded.

        Raises:
            UsageError: two wishes contradict each other, or the target cannot grant one.
        """
        if self.pattern not in PATTERNS:
            raise UsageError(
                f"--pattern {self.pattern} is not known. Choose from: {', '.join(PATTERNS)}."
            )
        if self.quantizer not in QUANTIZERS:
            raise UsageError(
                f"--quantizer {self.quantizer} is not known. Choose from: {', '.join(QUANTIZERS)}."
            )
        if self.quantizer != "zipc" and self.numerics not in ("auto", "int8", "int8-static"):
            raise UsageError(
                f"--quantizer {self.quantizer} calibrates INT8, and --numerics {self.numerics} "
                "has nothing to calibrate. Leave one out, or use --numerics int8-static."
            )
        if self.pattern == "2:4" and target.only_dense is not None:
            raise UsageError(
                f"--pattern 2:4 gains nothing on target '{target.name}': {target.only_dense}. "
                "Leave it out, or choose a GPU of NVIDIA's Ampere or later, as in --target a100."
            )
        if self.engine is not None and not target.signed:
            raise UsageError(
                f"--engine {self.engine} is for targets under TensorRT, and '{target.name}' runs "
                f"{target.runtime}. Leave it out, or choose one of zipc targets list."
            )
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            raise UsageError(
                f"--max-drop {self.max_drop:g} is no loss that can be allowed: give points of the "
                "metric, 0 or more, e.g. 0.5."
            )
        if self.engine_options:
            self._check_engine_options(target)
        floats = target.reference_numeric  # a network's floats are of one kind
        known = [n for n in target.numerics if n == floats or not n.startswith("fp")]
        if self.numerics not in ("auto", "int8", *known):
            hint = " For bf16 give --runtime openvino." if self.numerics == "bf16" else ""
            raise UsageError(
                f"--numerics {self.numerics} is not offered on target '{target.name}' under "
                f"{target.runtime}. Choose auto, int8, {', '.join(known)}.{hint}"
            )
        if self.numerics in DECODING and self.phase != "decode":
            others = ", ".join(n for n in target.numerics if n not in DECODING)
            raise UsageError(
                f"--numerics {self.numerics} is for decode steps of language models: many tokens "
                f"at once are faster in INT8. Give --phase decode, or choose auto, int8, {others}."
            )
        if self.layout is not None and target.runtime not in ("onnxruntime", "tensorrt"):
            raise UsageError(
                f"--layout {self.layout} serves the graph under ONNX Runtime. Leave it out, or "
                "give --runtime onnxruntime."
            )
        if self.past_length is not None and self.phase != "decode":
            raise UsageError("--past-length is of a decode step: give --phase decode with it.")
        if self.phase == "decode" and self.sequence_length not in (None, 1):
            raise UsageError(
                "A decode step reads one token: leave --sequence-length out. How many tokens came "
                "before is given with --past-length."
            )
        dense = self.pattern == "none" or target.only_dense is not None
        same = self.numerics == target.reference_numeric and dense
        if not self.prune and same:
            raise UsageError(
                f"--no-prune with --numerics {self.numerics} leaves the model as it is. Drop one."
            )

    @property
    def context(self) -> int | None:
        """Tokens that the last one timed can look at, itself included."""
        return self.sequence_length if self.past_length is None else self.past_length + 1

    @property
    def by_default(self) -> bool:
        """Whether the speedup must also hold with as many threads as the runtime takes by itself.

        A latency is met by one thread; more of them only shorten it.
        """
        return self.threads is None and self.latency_ms is None

    @property
    def workload(self) -> Workload:
        """What is timed; complete once `sources.settle` has filled in what the model decides."""
        shapes = {s.name: tuple(int(n) for n in s.shape) for s in self.input_shapes}
        return Workload(
            self.batch_size, self.sequence_length, self.threads or 1, shapes, self.past_length
        )

    def _check_engine_options(self, target: Target) -> None:
        EngineOptions.parse(self.engine_options)
        if not target.signed:
            raise UsageError(
                f"--engine-options is for targets under TensorRT, and '{target.name}' runs "
                f"{target.runtime}. Leave it out, or choose one of zipc targets list."
            )
        if self.host is not None:
            raise UsageError(
                "--engine-options is for OUT/build.sh and --engine, and engines are measured on "
                f"{self.host} without. Leave out one of --engine-options and --host."
            )
