"""Folders as `save_pretrained` writes them, with a tiny random model of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from zipc.core.quiet import hush

_ENCODER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
}
_DECODER = _ENCODER | {
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}
_T5: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
# family -> (architecture, settings of its config)
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", _ENCODER),
    "bert-classifier": ("BertForSequenceClassification", _ENCODER | {"num_labels": 3}),
    "bert-regression": ("BertForSequenceClassification", _ENCODER | {"num_labels": 1}),
    "bert-answers": ("BertForQuestionAnswering", _ENCODER),
    "bert-tags": ("BertForTokenClassification", _ENCODER | {"num_labels": 3}),
    "bert-masked": ("BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaForSequenceClassification", _ENCODER | {"num_labels": 3}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 12}
        | {"max_position_embeddings": 64, "num_labels": 3},
    ),
    "electra": ("ElectraForSequenceClassification", _ENCODER | {"embedding_size": 16}),
    "albert": ("AlbertForSequenceClassification", _ENCODER | {"embedding_size": 16}),
    "mpnet": ("MPNetModel", _ENCODER),
    "deberta": (
        "DebertaV2Model",
        _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"ffn_dim": 12, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "llama": ("LlamaForCausalLM", _DECODER),
    "llama-tied": ("LlamaForCausalLM", _DECODER | {"tie_word_embeddings": True}),
    "llama-classifier": ("LlamaForSequenceClassification", _DECODER | {"num_labels": 3}),
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    "mistral": ("MistralForCausalLM", _DECODER | {"sliding_window": 4}),
    "mixtral": (
        "MixtralForCausalLM",
        _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5-gated": ("T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "t5-encoder": ("T5EncoderModel", _T5),
    "vit": ("ViTForImageClassification", _PATCHES),
    "vit-body": ("ViTModel", _PATCHES),
    "deit": ("DeiTForImageClassification", _PATCHES),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2]}
        | {"num_heads": [2, 4], "window_size": 2, "num_labels": 3},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 12], "depths": [1, 2], "num_stages": 2, "image_size": 16}
        | {"num_labels": 3},
    ),
    "phi3": ("Phi3ForCausalLM", _DECODER),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        {k: v for k, v in _ENCODER.items() if k != "max_position_embeddings"}
        | {"conv_dim": [12, 12], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_labels": 3}
        | {"num_feat_extract_layers": 2, "classifier_proj_size": 8}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [1, 2], "num_labels": 3}
        | {"layer_type": "bottleneck"},
    ),
}


def family_folder(root: Path, family: str) -> Path:
    """The folder of a family under `root`, saved where it is not there yet."""
    path = root / family
    return path if path.is_dir() else save_family(family, path)


def save_family(family: str, folder: Path, **settings: Any) -> Path:
    """Save the model of a family with values that matter; `settings` go over its own."""
    architecture, own = FOLDERS[family]
    cls = getattr(transformers, architecture)
    with hush():
        module = cls(cls.config_class(**(own | settings)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for value in module.parameters():
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)
        module.save_pretrained(folder)
    return folder
