"""Our dense graph is nowhere slower than what torch.onnx.export writes, with fixed shapes or free.

    python benchmarks/bench_dense_export.py [--only NAME ...] [--rounds N]

One model of a realistic width and few layers per family, batch 1, random weights. Three graphs of
each alternate in one run on one thread under ONNX Runtime's default session options: ours (free
axes), the stock export with the same free axes, and the stock export with every shape fixed. The
times are those the thread spent on the processor, so that a busy machine disturbs them less.
Results go to benchmarks/results/dense_export.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from provenance import commit
from torch import Tensor, nn

from zipc.core.files import read_json, write_json
from zipc.core.quiet import hush
from zipc.core.types import Workload
from zipc.exporters.finish import finish
from zipc.exporters.onnx_export import check_parity, export_dense
from zipc.profiler.fingerprint import device_fingerprint
from zipc.profiler.runners.onnxruntime import OnnxRuntimeRunner
from zipc.profiler.timing import interleave, warm_up
from zipc.pruner.graph.trace import trace
from zipc.sources.attention import ATTENTION, register_attention
from zipc.sources.experts import EXPERTS, part_experts_, register_experts

RESULTS = Path(__file__).parent / "results" / "dense_export.json"
NAMES = ("ours", "stock", "stock_static")
STOCK = ("sdpa", "batched_mm")  # the only experts of transformers that ONNX can express
CONVOLUTIONAL = ("resnet-18", "mobilenet-v2", "convnext")
NOISE = 1.03  # a ratio of medians within this counts as equal
LENGTH = 128

_DECODER = {
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "use_cache": False,
}
# family -> (model class, config class, settings, kind of input)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "resnet-18": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
        "image",
    ),
    "mobilenet-v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {}, "image"),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"depths": [1, 1, 2, 1]},
        "image",
    ),
    "vit-small": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "num_hidden_layers": 3,
        },
        "image",
    ),
    "swin": ("SwinForImageClassification", "SwinConfig", {"depths": [2, 2, 2, 1]}, "image"),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {
            "vocab_size": 4000,
            "hidden_size": 384,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "num_hidden_layers": 3,
        },
        "text",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 4000, "n_layer": 2, "use_cache": False},
        "text",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 4000,
            "hidden_size": 512,
            "word_embed_proj_dim": 512,
            "ffn_dim": 2048,
            "num_attention_heads": 8,
            "num_hidden_layers": 2,
            "use_cache": False,
        },
        "text",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, "text"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER, "text"),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _DECODER
        | {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_local_experts": 8,
            "sliding_window": None,
        },
        "text",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 4000, "num_layers": 2, "use_cache": False, "decoder_start_token_id": 0},
        "pair",
    ),
}


@dataclass(frozen=True, slots=True)
class OnProcessor:
    """A runner whose milliseconds are those its thread spent on the processor."""

    runner: OnnxRuntimeRunner

    def run(self) -> float:
        start = time.thread_time_ns()
        self.runner.run()
        return (time.thread_time_ns() - start) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    held = read_json(arguments.output) if arguments.output.is_file() else {"rows": []}
    rows = {row["family"]: row for row in held["rows"]}
    print(f"{'family':14}" + "".join(f"{name + ' ms':>17}" for name in NAMES) + f"{'ratio':>8}")
    for family in arguments.only:
        rows[family] = row = measure(family, rounds=arguments.rounds)
        times = "".join(f"{median(row['samples_ms'][name]):17.2f}" for name in NAMES)
        print(f"{family:14}{times}{row['ratio']:8.3f}", flush=True)
        document = {
            "schema_version": 1,
            "claim": __doc__.splitlines()[0],
            "passed": all(r["ratio"] <= NOISE for r in rows.values()),
            "clock": "processor time of the thread",
            "device": device_fingerprint(runtime="onnxruntime"),
            "rows": [rows[name] for name in FAMILIES if name in rows],
        }
        write_json(arguments.output, document)
    print(f"written to {arguments.output}")


def measure(family: str, *, rounds: int) -> dict[str, Any]:
    """Time the three graphs of a family; `ratio` is ours to the faster of the others."""
    kind = FAMILIES[family][3]
    axes = _axes(kind)
    example, feeds = _example(kind, batch=2), _example(kind, batch=1)
    graphs = {
        "ours": ours(build(family, ATTENTION, EXPERTS), example, axes),
        "stock": stock(build(family, *STOCK), example, axes),
        "stock_static": stock(build(family, *STOCK), feeds, {}),
    }
    workload = Workload(batch_size=1, sequence_length=LENGTH, threads=1)
    arrays = {name: value.numpy() for name, value in feeds.items()}
    runners = {n: OnnxRuntimeRunner(g, workload=workload, feeds=arrays) for n, g in graphs.items()}
    outputs = {n: next(iter(r.outputs(arrays).values())) for n, r in runners.items()}
    timed = [OnProcessor(runners[name]) for name in NAMES]
    for runner in timed:
        warm_up(runner, max_runs=10)
    samples = dict(zip(NAMES, interleave(timed, rounds=rounds), strict=True))
    medians = {name: median(values) for name, values in samples.items()}
    return {
        "family": family,
        "commit": commit(),
        "settings": {k: v for k, v in FAMILIES[family][2].items()},
        "parity": check_parity(
            [outputs["ours"]], [outputs["stock_static"]], bound=1e-4, what=family
        ),
        "ratio": round(medians["ours"] / min(medians["stock"], medians["stock_static"]), 4),
        "samples_ms": {n: [round(v, 4) for v in values] for n, values in samples.items()},
    }


def build(family: str, attention: str, experts: str) -> nn.Module:
    """The model with random weights, the same for every call."""
    model, config, settings, _ = FAMILIES[family]
    register_attention()
    register_experts()
    torch.manual_seed(0)
    with hush():
        module: nn.Module = getattr(transformers, model)._from_config(
            getattr(transformers, config)(**settings),
            attn_implementation=None if family in CONVOLUTIONAL else attention,
            **({"experts_implementation": experts} if "Mixtral" in model else {}),
        )
    if experts == EXPERTS:
        part_experts_(module)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):  # or the signal dies out over many layers
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    return module.eval().requires_grad_(False)


def ours(module: nn.Module, example: dict[str, Tensor], axes: dict[str, dict[int, str]]) -> bytes:
    program = trace(
        module, example, dynamic=axes, limits=dict.fromkeys(("sequence", "target"), 256)
    )
    graph = export_dense(program.exported, example, outputs=[(0, "result")], dynamic=axes)
    finish(graph)
    return graph.to_bytes()


def stock(
    module: nn.Module, example: dict[str, Tensor], axes: Mapping[str, Mapping[int, str]]
) -> bytes:
    """What torch writes by itself, optimised the way it does by default."""
    dims = {name: torch.export.Dim(name, max=256) for a in axes.values() for name in a.values()}
    shapes = {k: {i: dims[n] for i, n in axes.get(k, {}).items()} for k in example}
    with torch.no_grad(), hush():
        program = torch.onnx.export(
            module,
            (),
            kwargs=example,
            dynamo=True,
            optimize=True,
            dynamic_shapes=shapes if axes else None,
            verbose=False,
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _axes(kind: str) -> dict[str, dict[int, str]]:
    if kind == "image":
        return {"pixel_values": {0: "batch"}}
    axes = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
    return axes if kind == "text" else axes | {"decoder_input_ids": {0: "batch", 1: "target"}}


def _example(kind: str, *, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if kind == "image":
        return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=generator)}
    ids = torch.randint(4, 4000, (batch, LENGTH), generator=generator)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "pair":
        feeds["decoder_input_ids"] = ids[:, : LENGTH // 2].contiguous()
    return feeds


if __name__ == "__main__":
    main()
