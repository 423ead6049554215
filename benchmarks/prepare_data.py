"""Bring public data and models into the forms that `zipc compile` reads.

    python benchmarks/prepare_data.py --data-dir DIR --out OUT [--only cifar10,stories260k]

DIR holds one folder a data set, as its own README describes it:

cifar10      cifar10_lossless.npz (50,000 train images and the first 1,000 of test, delta-coded) and
             cifar10_test10k_jpeg_q75.npz (all test images as JPEG). Gives OUT/cifar10/train.npz,
             images of train, shifted and mirrored at random, since the networks know the plain ones
             by heart; dev.npz, the 1,000 lossless test images; test.npz, the other 9,000 as JPEG.
stories260k  the Llama of llama2.c with 260,032 parameters, and five stories. Gives
             OUT/stories260k/model, a Hugging Face folder, whose loss on the stories is checked, and
             OUT/stories260k/text: train.txt, sampled from the model itself, and test.txt, the five.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

INPUT = "x"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the CIFAR ResNets were trained with
AUGMENTED = 12_000  # images of train
SHIFT = 4  # pixels, as in the networks' training
STORIES, BATCH = 1500, 100  # sampled for calibration and search
LONGEST = 400  # tokens of a sampled story
LOSS, TOKENS = 1.2664, 1804  # of the five stories, in nats a token
BOS, EOS, BYTES = 1, 2, 3  # ids; byte b is id b + BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(CONVERTERS), help="names, with commas")
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        if name not in CONVERTERS:
            parser.error(f"--only {name}: choose of {', '.join(CONVERTERS)}")
        out = arguments.out / name
        out.mkdir(parents=True, exist_ok=True)
        CONVERTERS[name](arguments.data_dir / name, out)
        print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def cifar10(source: Path, out: Path) -> None:
    """Write train.npz, dev.npz and test.npz."""
    with np.load(source / "cifar10_lossless.npz", allow_pickle=False) as held:
        train, train_y = undo_deltas(held["train_d"]), held["train_y"].astype(np.int64)
        dev, dev_y = undo_deltas(held["test_d"]), held["test_y"].astype(np.int64)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(len(train))[:AUGMENTED])
    save(out / "train.npz", augmented(train[chosen], rng), train_y[chosen])
    save(out / "dev.npz", dev, dev_y)
    with np.load(source / "cifar10_test10k_jpeg_q75.npz", allow_pickle=False) as held:
        labels, offsets = held["test_y"].astype(np.int64), held["offsets"]
        rest = others(labels, known=dev_y)
        header, blob = held["header"].tobytes(), held["blob"]
        images = [decode(header + blob[offsets[i] : offsets[i + 1]].tobytes()) for i in rest]
    save(out / "test.npz", np.stack(images), labels[rest])


def undo_deltas(deltas: np.ndarray) -> np.ndarray:
    """Bytes (3, n, h, w) of differences to images (n, h, w, 3)."""
    colours = np.cumsum(np.cumsum(deltas, axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
    colours[0] += colours[1]
    colours[2] += colours[1]
    return np.ascontiguousarray(colours.transpose(1, 2, 3, 0))


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift each image by up to SHIFT pixels into black, and mirror half of them."""
    made = np.zeros_like(images)
    size = images.shape[1]
    for i, image in enumerate(images):
        wide = np.pad(image, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
        top, left = rng.integers(0, 2 * SHIFT + 1, 2)
        made[i] = wide[top : top + size, left : left + size]
        if rng.random() < 0.5:
            made[i] = made[i, :, ::-1]
    return made


def others(labels: np.ndarray, *, known: np.ndarray) -> np.ndarray:
    """Positions of the images that are not among the known ones.

    In the JPEG file the classes follow one another; in each, the known ones come first.
    """
    counts = np.bincount(known, minlength=int(labels.max()) + 1)
    return np.concatenate([np.flatnonzero(labels == c)[n:] for c, n in enumerate(counts)])


def decode(jpeg: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def save(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images as bytes with what normalises them."""
    np.savez(
        path, **{INPUT: images, "labels": labels, "mean": np.array(MEAN), "std": np.array(STD)}
    )


def stories260k(source: Path, out: Path) -> None:
    """Write the model folder, check its loss, and sample text from it."""
    settings = json.loads((source / "config.json").read_text())
    vocabulary = json.loads((source / "tokenizer.json").read_text())
    model = llama(settings, load_file(source / "model.safetensors"))
    tokenizer = tokenizer_of(vocabulary)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    text = (source / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    loss, tokens = loss_of(model, tokenizer, stories)
    print(f"loss on the {len(stories)} stories: {loss:.4f} nats/token over {tokens:,} tokens")
    if tokens != TOKENS or abs(loss - LOSS) > 5e-4:
        raise SystemExit(f"expected {LOSS} over {TOKENS:,}: the conversion is wrong")
    (out / "text").mkdir(exist_ok=True)
    seeds = range(STORIES // BATCH)
    sampled = [story for seed in seeds for story in sample(model, tokenizer, seed=seed)]
    for name, held in (("train.txt", sampled), ("test.txt", stories)):
        (out / "text" / name).write_text("\n<|endoftext|>\n".join(held) + "\n", encoding="utf-8")


def llama(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The checkpoint as a LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["dim"],
        intermediate_size=settings["hidden_dim"],
        num_hidden_layers=settings["n_layers"],
        num_attention_heads=settings["n_heads"],
        num_key_value_heads=settings["n_kv_heads"],
        max_position_embeddings=settings["max_seq_len"],
        rms_norm_eps=settings["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        tie_word_embeddings=settings["tie_word_embeddings"],
        bos_token_id=settings["bos_id"],
        eos_token_id=settings["eos_id"],
    )
    head = settings["dim"] // settings["n_heads"]
    model = LlamaForCausalLM(config)
    state = {renamed(name): halved(name, t, head=head) for name, t in tensors.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def renamed(name: str) -> str:
    """The Hugging Face name of a tensor of llama2.c."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{NAMES[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def halved(name: str, weight: Tensor, *, head: int) -> Tensor:
    """Rows of queries and keys from interleaved pairs (2i, 2i + 1) to (i, i + head / 2)."""
    if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
        return weight
    pairs = weight.reshape(-1, head // 2, 2, weight.shape[1])  # (heads, pairs, 2, in)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def tokenizer_of(vocabulary: dict[str, Any]) -> Any:
    """The SentencePiece vocabulary with scores as merges: the best score is merged first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens, scores = list(vocabulary["tokens"]), vocabulary["scores"]
    tokens[BOS], tokens[EOS] = "<s>", "</s>"
    ids = {token: i for i, token in enumerate(tokens)}
    first = BYTES + 256  # what comes before is not made by merging
    pieces = sorted(range(first, len(tokens)), key=lambda i: -scores[i])
    merges = [
        (tokens[i][:cut], tokens[i][cut:])
        for i in pieces
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in ids and tokens[i][cut:] in ids
    ]
    base = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    base.normalizer = normalizers.Prepend(" ")
    base.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    base.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


@torch.inference_mode()
def loss_of(model: Any, tokenizer: Any, texts: list[str]) -> tuple[float, int]:
    """Nats a token over whole texts, each on its own, and the number of tokens."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count, count


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, *, seed: int) -> list[str]:
    """Stories drawn at temperature 1, each until the model begins another."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((BATCH, 1), BOS)
    drawn, past = [], None
    while len(drawn) < LONGEST:
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        ids = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        drawn.append(ids)
    rows = torch.cat(drawn, dim=1).tolist()
    ends = [next((i for i, t in enumerate(row) if t in (BOS, EOS)), len(row)) for row in rows]
    return [tokenizer.decode(row[:end]).strip() for row, end in zip(rows, ends, strict=True)]


CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "cifar10": cifar10,
    "stories260k": stories260k,
}

if __name__ == "__main__":
    main()
