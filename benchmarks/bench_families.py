"""Every family of networks compiles end to end: found, cut, exported, and proved on this machine.

    python benchmarks/bench_families.py [--families bert,vit] [--speedup 1.3x]

The networks have the size of small real ones and random weights, the data is random too: what is
shown is that the loop closes and that the speedup is real, not what quality is kept. Each is
compiled by the command line in a process of its own. Results go to
benchmarks/results/families.json; families found there are not run again (--fresh forgets them).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import compile_model
from provenance import commit

from zipc.core.files import read_json, write_json
from zipc.core.quiet import hush
from zipc.profiler.fingerprint import device_fingerprint

RESULTS = Path(__file__).parent / "results" / "families.json"
LENGTH, ROWS, CLASSES = 64, 400, 10
TEXT: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
    "max_position_embeddings": 130,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSIFIER = TEXT | {"num_labels": CLASSES}
GROUPED = TEXT | {"num_key_value_heads": 4}
PAIR: dict[str, Any] = {
    "vocab_size": 500,
    "d_model": 256,
    "d_kv": 32,
    "d_ff": 1024,
    "num_layers": 3,
    "num_heads": 8,
    "decoder_start_token_id": 0,
}
IMAGE: dict[str, Any] = {"image_size": 64, "num_labels": CLASSES}
PATCHES = IMAGE | {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 768,
    "patch_size": 8,
}
STAGES = IMAGE | {"depths": [2, 2, 2, 2]}
SIZED = ["--input-shapes", "pixel_values:1x3x64x64"]  # of folders that do not say how large
# family -> (architecture, settings, more flags)
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "bert": ("BertForSequenceClassification", CLASSIFIER, []),
    "roberta": ("RobertaForSequenceClassification", CLASSIFIER, []),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 500, "dim": 256, "n_layers": 4, "n_heads": 8, "hidden_dim": 1024}
        | {"num_labels": CLASSES},
        [],
    ),
    "electra": ("ElectraForSequenceClassification", CLASSIFIER | {"embedding_size": 128}, []),
    "albert": ("AlbertForSequenceClassification", CLASSIFIER | {"embedding_size": 128}, []),
    "mpnet": ("MPNetForSequenceClassification", CLASSIFIER, []),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        CLASSIFIER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        [],
    ),
    "modernbert": ("ModernBertForSequenceClassification", CLASSIFIER | {"cls_token_id": 3}, []),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 500, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 130},
        [],
    ),
    "opt": (
        "OPTForCausalLM",
        TEXT | {"ffn_dim": 1024, "word_embed_proj_dim": 256},
        [],
    ),
    "llama": ("LlamaForCausalLM", GROUPED, []),
    "llama-decode": ("LlamaForCausalLM", GROUPED, ["--phase", "decode", "--past-length", "63"]),
    "llama-512-decode": (
        "LlamaForCausalLM",
        GROUPED
        | {
            "hidden_size": 512,
            "intermediate_size": 1408,
        },
        ["--phase", "decode", "--past-length", "63"],
    ),
    "gpt2-decode": (
        "GPT2LMHeadModel",
        {"vocab_size": 500, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 130},
        ["--phase", "decode", "--past-length", "63"],
    ),
    "qwen2": ("Qwen2ForCausalLM", GROUPED, []),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 32}, []),
    "mixtral": (
        "MixtralForCausalLM",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
        [],
    ),
    "t5": ("T5ForConditionalGeneration", PAIR, []),
    "bart": (
        "BartForConditionalGeneration",
        {"vocab_size": 500, "d_model": 256, "max_position_embeddings": 130}
        | {f"{part}_layers": 3 for part in ("encoder", "decoder")}
        | {f"{part}_attention_heads": 8 for part in ("encoder", "decoder")}
        | {f"{part}_ffn_dim": 1024 for part in ("encoder", "decoder")},
        [],
    ),
    "vit": ("ViTForImageClassification", PATCHES, []),
    "deit": ("DeiTForImageClassification", PATCHES, []),
    "dinov2": (
        "Dinov2ForImageClassification",
        {k: v for k, v in PATCHES.items() if k != "intermediate_size"},
        [],
    ),
    "swin": (
        "SwinForImageClassification",
        STAGES
        | {"patch_size": 2, "embed_dim": 48, "depths": [2, 2, 2]}
        | {"num_heads": [3, 6, 12], "window_size": 4},
        [],
    ),
    "convnext": (
        "ConvNextForImageClassification",
        STAGES | {"hidden_sizes": [48, 96, 192, 384]},
        [],
    ),
    "resnet": (
        "ResNetForImageClassification",
        STAGES | {"embedding_size": 32, "hidden_sizes": [64, 128, 256, 512]},
        SIZED,
    ),
    "regnet": (
        "RegNetForImageClassification",
        STAGES | {"embedding_size": 32, "hidden_sizes": [64, 128, 192, 256], "groups_width": 16},
        SIZED,
    ),
    "mobilenet-v1": ("MobileNetV1ForImageClassification", IMAGE, []),
    "mobilenet-v2": ("MobileNetV2ForImageClassification", IMAGE, []),
    "efficientnet": (
        "EfficientNetForImageClassification",
        IMAGE | {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
        [],
    ),
    "mobilevit": ("MobileViTForImageClassification", IMAGE, []),
    "poolformer": (
        "PoolFormerForImageClassification",
        STAGES | {"hidden_sizes": [32, 64, 128, 256]},
        SIZED,
    ),
    "segformer": (
        "SegformerForImageClassification",
        STAGES | {"hidden_sizes": [32, 64, 128, 256], "num_attention_heads": [1, 2, 4, 8]},
        SIZED,
    ),
}
# network in plain torch -> (module, class, arguments); the small ones of the tests, wider
PLAIN: dict[str, tuple[str, str, str]] = {
    "resnet-20": ("vision", "CifarResNet", "depth=20, width=16"),
    "vgg": ("vision", "Vgg", "(64, None, 128, 128, None, 256, None, 256, None, 256, None)"),
    "googlenet": ("vision", "GoogLeNet", "scale=8"),
    "densenet": ("vision", "DenseNet", "growth=32, stem=64"),
    "mobilenet-v3": ("vision", "MobileNetV3", "scale=8"),
    "unet": ("dense_prediction", "UNet", "scale=8"),
    "yolo": ("dense_prediction", "Yolo", "scale=8"),
    "vit-by-hand": ("by_hand", "Vit", "192, 6, 4, patch=8, size=64"),
}
FACTORY = """import torch
from tests.zoo.{module} import {network}

example_inputs = {{"x": torch.zeros(1, 3, 64, 64)}}


def network():
    torch.manual_seed(0)
    return {network}({arguments}).eval()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join([*FAMILIES, *PLAIN]))
    parser.add_argument("--speedup", default="1.3x")
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget the runs in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    held = {} if arguments.fresh or not arguments.out.is_file() else read_json(arguments.out)
    runs: dict[str, Any] = held.get("families", {})
    for family in arguments.families.split(","):
        if family in runs:
            continue
        with tempfile.TemporaryDirectory(prefix="zipc-bench-") as folder:
            runs[family] = one_run(arguments, family, Path(folder))
        write_json(arguments.out, document(runs))
        print(f"{family}: {runs[family]}", flush=True)
    print(f"passed: {document(runs)['passed']}; written to {arguments.out}")


def one_run(arguments: argparse.Namespace, family: str, folder: Path) -> dict[str, Any]:
    """Save a model and data, compile, and keep what came out."""
    if family in PLAIN:
        module, architecture, given = PLAIN[family]
        file = folder / "net.py"
        file.write_text(FACTORY.format(module=module, network=architecture, arguments=given))
        model, flags, kind = f"{file}:network", [], "x"
    else:
        architecture, settings, flags = FAMILIES[family]
        save_model(architecture, settings, folder / "model")
        model, kind = str(folder / "model"), kind_of(architecture)
    save_data(architecture, kind, folder / "data.npz")
    asked = [model, *flags, "--data", str(folder / "data.npz")]
    asked += ["--speedup", arguments.speedup, "--effort", arguments.effort]
    asked += ["-o", str(folder / "out"), "--cache-dir", str(folder / "cache")]
    if "text" in kind and "decode" not in family:
        asked += ["--sequence-length", str(LENGTH)]
    ran = compile_model(asked)
    run: dict[str, Any] = {
        "architecture": architecture,
        "asked": arguments.speedup,
        "commit": commit(),
        "exit_code": ran.exit_code,
        "compile_s": round(ran.compile_s, 1),
        "peak_rss_gib": round(ran.peak_rss_gib, 2),
    }
    if not (folder / "out" / "manifest.json").is_file():
        return run | {"verdict": "none", "said": ran.said[-600:]}
    manifest = read_json(folder / "out" / "manifest.json")
    latency = manifest["latency"]
    return run | {
        "verdict": manifest["verdict"],
        "speedup": round(latency["speedup"], 3),
        "speedup_ci95": [round(end, 3) for end in latency["speedup_ci95"]],
        "reference_ms": round(latency["reference_ms"], 3),
        "prediction_error": round(latency["prediction_error"], 3),
        "sites": len(manifest["allocation"]),
        "left_alone": len(manifest["left_alone"]),
        "notes": latency["notes"],
    }


def kind_of(architecture: str) -> str:
    """What a model of this architecture reads: text, a text pair, or images by this name."""
    if "Image" in architecture:
        return "pixel_values"
    return "text pair" if "ConditionalGeneration" in architecture else "text"


def save_model(architecture: str, settings: dict[str, Any], folder: Path) -> None:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, architecture)
    with hush():
        module = made(made.config_class(**settings))
        with torch.no_grad():  # vectors that are all 0 or 1 would hide mistakes
            for value in module.parameters():
                if value.dim() < 2:
                    value.add_(0.1 * torch.randn_like(value))
        module.save_pretrained(folder)


def save_data(architecture: str, kind: str, path: Path) -> None:
    rng = np.random.default_rng(0)
    if "text" not in kind:
        arrays = {kind: rng.standard_normal((ROWS, 3, 64, 64), dtype=np.float32)}
    else:
        ids = rng.integers(5, 500, (ROWS, LENGTH))
        ids[:, -1] = 2
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if kind == "text pair":
            decoded = rng.integers(5, 500, (ROWS, LENGTH))
            arrays |= {"decoder_input_ids": decoded, "decoder_attention_mask": np.ones_like(ids)}
        if architecture.startswith(("Bert", "Electra", "Albert", "Deberta")):
            arrays["token_type_ids"] = np.zeros_like(ids)
    np.savez(path, **arrays)


def document(runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "claim": __doc__.splitlines()[0],
        "passed": all(run["verdict"] == "validated" for run in runs.values()),
        "device": device_fingerprint(runtime="onnxruntime"),
        "families": runs,
    }


if __name__ == "__main__":
    main()
