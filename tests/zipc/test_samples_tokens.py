"""Texts for models with an output per token and for models with a decoder."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests.tiny_sources import Lookup, lookup_onnx, request_of, source_of
from zipc.core.types import InputSpec
from zipc.samples import open_samples
from zipc.samples.rows import RowSamples

WORDS = [f"w{i}" for i in range(30)]
PAD, END, START = 0, 1, 2
TABLE = np.random.default_rng(0).normal(size=(33, 33)).astype(np.float32)
IDS = InputSpec("input_ids", "int64", ("batch", "sequence"), high=33)
MASK = InputSpec("attention_mask", "int64", ("batch", "sequence"), high=2)
DECODER = InputSpec("decoder_input_ids", "int64", ("batch", "decoder_sequence"), high=33)


class Both(nn.Module):
    """Logits of the decoder's tokens; the encoder's are looked at only to be there."""

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> dict[str, Tensor]:
        table = torch.from_numpy(TABLE)
        return {"logits": table[decoder_input_ids] + 0 * table[input_ids].sum()}


class Masked(Lookup):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return super().forward(input_ids)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<go>", *WORDS])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="</s>")


def pairs_file(path: Path) -> Path:
    rng = np.random.default_rng(0)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "answer"])
        for _ in range(90):
            writer.writerow([" ".join(rng.choice(WORDS, rng.integers(2, 6))) for _ in range(2)])
    return path


def opened(module: nn.Module, specs: list[InputSpec], data: Path) -> RowSamples:
    source = source_of(module, specs=specs, tokenizer=tokenizer(), folder=data.parent)
    source.config = SimpleNamespace(decoder_start_token_id=START)
    samples = open_samples(source, request_of(data, sequence_length=12))
    assert isinstance(samples, RowSamples)
    return samples


def words(ids: Any) -> list[str]:
    return [["<pad>", "</s>", "<go>", *WORDS][int(i)] for i in ids]


def test_a_decoder_reads_the_second_text_behind_its_start(tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "a.csv")
    rows = {tuple(row) for row in csv.reader(data.open())}
    samples = opened(Both(), [IDS, DECODER], data)
    assert samples.metric == "agreement"
    for batch in samples.draw("calibration", limit=40, seed=0).batches:
        assert set(batch) == {"input_ids", "decoder_input_ids", "attention_mask"}
        for first, second in zip(batch["input_ids"], batch["decoder_input_ids"], strict=True):
            question = " ".join(w for w in words(first) if w.startswith("w"))
            told = words(second)
            answer = " ".join(w for w in told if w.startswith("w"))
            assert (question, answer) in rows
            assert told[0] == "<go>"
            assert told[: 2 + answer.count("w")][-1] == "</s>"


def test_tokens_are_compared_each_without_padding(tmp_path: Path) -> None:
    data = pairs_file(tmp_path / "a.csv")
    samples = opened(Masked(TABLE), [IDS, MASK], data)
    other = TABLE + np.random.default_rng(1).normal(size=TABLE.shape).astype(np.float32)
    result = samples.compare(lookup_onnx(TABLE), lookup_onnx(other), "test")[1]
    held = samples.rows.feeds(samples.parts["test"])
    ids, mask = held["input_ids"], held["attention_mask"]
    assert ids.shape == (samples.sizes["test"], 12)
    same = TABLE.argmax(1)[ids] == other.argmax(1)[ids]
    shares = [s[m == 1].mean() for s, m in zip(same, mask, strict=True)]
    assert result.value == np.float64(100 * np.mean(shares))
    assert (words(ids[0]).count("</s>"), mask[0].sum()) == (2, (ids[0] != PAD).sum())
