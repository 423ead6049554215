"""Finding the sites of a large network and cutting them takes seconds, not minutes.

    python benchmarks/bench_discovery.py

A BERT-base with values: under 20 s on two cores. A Llama of a billion parameters on the meta
device, where nothing has values: under 60 s. Each is traced, its sites are found and tried out,
and half of every site is cut. Results go to benchmarks/results/discovery.json.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from provenance import commit
from torch import Tensor, nn

from zipc.core.files import write_json
from zipc.core.quiet import hush
from zipc.profiler.fingerprint import device_fingerprint
from zipc.pruner.graph.sites import find_sites
from zipc.pruner.graph.surgery import describe, reshaped
from zipc.pruner.graph.trace import trace
from zipc.pruner.graph.verify import verify
from zipc.sources.attention import ATTENTION, register_attention

RESULTS = Path(__file__).parent / "results" / "discovery.json"
LENGTH = 16
AXES = {name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}
LLAMA = {  # the shape of the smallest Llama 3.2
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "use_cache": False,
}
# name -> (architecture, configuration, device, most seconds)
NETWORKS: dict[str, tuple[str, Any, str, float]] = {
    "bert-base": ("BertForSequenceClassification", transformers.BertConfig(), "cpu", 20.0),
    "llama-1b": ("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA), "meta", 60.0),
}


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    found = {}
    for name, (architecture, config, device, most) in NETWORKS.items():
        module = build(architecture, config, device)
        limits = {"sequence": config.max_position_embeddings}
        found[name] = measured(module, device, limits) | {"bar_s": most}
        print(name, found[name], flush=True)
    passed = all(run["seconds"] <= run["bar_s"] and run["halved"] for run in found.values())
    write_json(
        RESULTS,
        {
            "schema_version": 1,
            "claim": __doc__.splitlines()[0],
            "commit": commit(),
            "passed": passed,
            "device": device_fingerprint(runtime="onnxruntime"),
            "networks": found,
        },
    )
    print(f"passed: {passed}; written to {RESULTS}")


def build(architecture: str, config: Any, device: str) -> nn.Module:
    register_attention()
    config.return_dict = True
    with hush(), torch.device(device):
        module: nn.Module = getattr(transformers, architecture)._from_config(
            config, attn_implementation=ATTENTION
        )
    return module.eval().requires_grad_(False)


def measured(module: nn.Module, device: str, limits: dict[str, int]) -> dict[str, Any]:
    """Seconds of every step, and what was found."""
    example: dict[str, Tensor] = {
        name: torch.ones(2, LENGTH, dtype=torch.long, device=device) for name in AXES
    }
    parameters = sum(p.numel() for p in module.parameters())
    steps = Steps()
    program = trace(module, example, dynamic=AXES, limits=limits)
    steps.done("trace")
    structure = find_sites(program)
    steps.done("find")
    structure = verify(module, program, structure, example)
    steps.done("try out")
    widths = {site.name: site.units // 2 for site in structure.sites if site.units > 1}
    made = reshaped(module, describe(module, program, structure, widths=widths))
    steps.done("cut")
    left = sum(p.numel() for p in made.parameters())
    return {
        "parameters": parameters,
        "parameters_of_half": left,
        "halved": len(widths) == len(structure.sites) and left < parameters,
        "sites": len(structure.sites),
        "left_alone": len(structure.left_alone),
        "seconds": round(sum(steps.seconds.values()), 1),
        "steps_s": steps.seconds,
    }


class Steps:
    """How long each step took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def done(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._since, 2)
        self._since = now


if __name__ == "__main__":
    main()
