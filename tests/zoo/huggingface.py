"""Tiny random transformers models, made from their configs the way zipc loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.zoo.values import VOCABULARY, images, ready, tokens
from zipc.core.quiet import hush
from zipc.model_source import ATTENTION, register_attention
from zipc.sources.experts import EXPERTS, part_experts_, register_experts

_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "pad_token_id": 1,
    "num_labels": 3,
}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "use_cache": False,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    "use_cache": False,
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


def _made(
    architecture: str,
    config: Any,
    *,
    feeds: Mapping[str, Tensor] | None = None,
    attention: str = ATTENTION,
    seed: int = 0,
) -> nn.Module:
    register_attention()
    with hush():
        module = getattr(transformers, architecture)._from_config(
            config, attn_implementation=attention
        )
    part_experts_(module)
    return ready(module, tokens() if feeds is None else feeds, seed=seed)


# ---------------------------------------------------------------- encoders


def bert() -> nn.Module:
    return _made("BertForSequenceClassification", transformers.BertConfig(**_ENCODER))


def bert_masked_lm() -> nn.Module:
    """The decoder of the head is the embedding: one tensor, two modules."""
    return _made("BertForMaskedLM", transformers.BertConfig(**_ENCODER))


def roberta() -> nn.Module:
    return _made("RobertaForSequenceClassification", transformers.RobertaConfig(**_ENCODER))


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=12,
        max_position_embeddings=32,
        pad_token_id=1,
        num_labels=3,
    )
    return _made("DistilBertForSequenceClassification", config)


def electra() -> nn.Module:
    config = transformers.ElectraConfig(**_ENCODER, embedding_size=16)
    return _made("ElectraForSequenceClassification", config)


def albert() -> nn.Module:
    """Both layers are one module, called twice."""
    config = transformers.AlbertConfig(**_ENCODER, embedding_size=16)
    return _made("AlbertForSequenceClassification", config)


def mpnet() -> nn.Module:
    """Relative positions are added to the attention scores, one bias per head."""
    config = transformers.MPNetConfig(**_ENCODER)
    return _made("MPNetForSequenceClassification", config, attention="eager")


def deberta() -> nn.Module:
    """Attention by content and position apart, looked up by distance; heads beside the batch."""
    config = transformers.DebertaV2Config(
        **_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]
    )
    return _made("DebertaV2ForSequenceClassification", config, attention="eager")


# ---------------------------------------------------------------- decoders


def gpt2() -> nn.Module:
    """Fused query, key and value in Conv1D layout, and a head tied to the embedding."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=12,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        use_cache=False,
    )
    return _made("GPT2LMHeadModel", config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=12,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
        pad_token_id=1,
        use_cache=False,
    )
    return _made("OPTForCausalLM", config)


def llama() -> nn.Module:
    """Four query heads on two key and value heads."""
    return _made("LlamaForCausalLM", transformers.LlamaConfig(**_DECODER))


def llama_one_kv_head() -> nn.Module:
    """All query heads share one key and value head; the head is tied to the embedding."""
    settings = _DECODER | {"num_key_value_heads": 1, "tie_word_embeddings": True}
    return _made("LlamaForCausalLM", transformers.LlamaConfig(**settings))


def qwen2() -> nn.Module:
    """Query, key and value have biases, the rest has none."""
    return _made("Qwen2ForCausalLM", transformers.Qwen2Config(**_DECODER))


def mistral() -> nn.Module:
    """Attention reaches back four tokens."""
    return _made("MistralForCausalLM", transformers.MistralConfig(**_DECODER, sliding_window=4))


def phi3() -> nn.Module:
    """Queries, keys and values of one map, cut out of it by slices; gate and up are another."""
    return _made("Phi3ForCausalLM", transformers.Phi3Config(**_DECODER))


def mixtral() -> nn.Module:
    """Four experts, two per token."""
    config = transformers.MixtralConfig(
        **_DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    )
    register_experts()
    config._experts_implementation = EXPERTS
    return _made("MixtralForCausalLM", config)


def qwen2_moe() -> nn.Module:
    """Five experts, of which a token gets two with shares that do not add up to 1, and one more
    for every token."""
    config = transformers.Qwen2MoeConfig(
        **_DECODER,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=6,
        shared_expert_intermediate_size=8,
        norm_topk_prob=False,
    )
    register_experts()
    config._experts_implementation = EXPERTS
    return _made("Qwen2MoeForCausalLM", config, seed=1)  # every expert is chosen often enough


def t5() -> nn.Module:
    """Heads of width 6 in a stream of 32; the first layer's relative positions serve them all."""
    config = transformers.T5Config(**_T5)
    # its ReLU has no bias that could be centred: this seed leaves no unit dead
    return _made("T5ForConditionalGeneration", config, feeds=pairs(), seed=1)


def t5_gated() -> nn.Module:
    """The later form: a gated FFN and a head of its own."""
    config = transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return _made("T5ForConditionalGeneration", config, feeds=pairs())


def pairs(*, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A source text and the beginning of a target text that is two tokens shorter."""
    feeds = tokens(batch=batch, length=length, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    target = torch.randint(4, VOCABULARY, (batch, max(2, length - 2)), generator=generator)
    return feeds | {"decoder_input_ids": target}


# ---------------------------------------------------------------- images


def pixels(*, batch: int = 2, size: int = 16, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": images(batch=batch, size=size, seed=seed)["x"]}


def vit() -> nn.Module:
    return _made("ViTForImageClassification", transformers.ViTConfig(**_PATCHES), feeds=pixels())


def deit() -> nn.Module:
    return _made("DeiTForImageClassification", transformers.DeiTConfig(**_PATCHES), feeds=pixels())


def swin() -> nn.Module:
    """Windows of 2x2 patches, shifted in every second layer; patches merge between the stages."""
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=2,
        mlp_ratio=1.5,
        num_labels=3,
    )
    return _made("SwinForImageClassification", config, feeds=pixels())


def pvt_v2() -> nn.Module:
    """Keys and values of fewer places; where heads are gone, its code does not know their width."""
    config = transformers.PvtV2Config(
        image_size=32,
        hidden_sizes=[8, 12],
        depths=[1, 1],
        num_attention_heads=[2, 3],
        mlp_ratios=[2, 2],
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_encoder_blocks=2,
        num_labels=3,
    )
    return _made("PvtV2ForImageClassification", config, feeds=pixels(size=32))


def convnext() -> nn.Module:
    """7x7 depthwise filters, LayerNorm over channels in both layouts, and a scale per channel."""
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12], depths=[2, 2], num_stages=2, patch_size=2, image_size=16, num_labels=3
    )
    return _made("ConvNextForImageClassification", config, feeds=pixels())


def mobilevit() -> nn.Module:
    """Attention over the pixels at one place of every patch: a view joins batch and channels."""
    config = transformers.MobileViTConfig(
        image_size=32,
        output_stride=8,
        hidden_sizes=[8, 12, 16],
        neck_hidden_sizes=[4, 4, 6, 8, 8, 8, 12],
        num_attention_heads=2,
        expand_ratio=2.0,
        mlp_ratio=1.5,
        num_labels=3,
    )
    return _made("MobileViTForImageClassification", config, feeds=pixels(size=32), seed=1)


def efficientnet() -> nn.Module:
    """Depthwise convolutions of a class of their own, and squeeze-and-excite."""
    config = transformers.EfficientNetConfig(
        image_size=32,
        width_coefficient=1 / 16,  # of all that follows, and of what the code adds at either end
        depth_coefficient=1.0,
        depth_divisor=2,
        in_channels=[32, 64, 96],
        out_channels=[64, 96, 128],
        kernel_sizes=[3, 3, 3],
        strides=[1, 2, 1],
        num_block_repeats=[1, 2, 1],
        expand_ratios=[1, 2, 2],
        squeeze_expansion_ratio=0.5,
        hidden_dim=80,
        num_labels=3,
    )
    return _made("EfficientNetForImageClassification", config, feeds=pixels(size=32), seed=19)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=6,
        hidden_sizes=[12, 16],
        depths=[2, 2],
        layer_type="bottleneck",
        num_labels=3,
    )
    return _made("ResNetForImageClassification", config, feeds=pixels(size=32))
