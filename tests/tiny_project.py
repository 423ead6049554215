"""A tiny model folder, tiny data, and a clock that makes whole compiles exact and quick."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from zipc import whole_models
from zipc.core.request import Request
from zipc.core.types import Silent, Workload
from zipc.effort import EFFORTS
from zipc.profiler.runners.apart import TimingProcess
from zipc.profiler.runners.registry import RUNNERS
from zipc.profiler.runners.session import SessionRunner

WORDS = (
    "the a cat dog bird tree house river runs sits sings falls grows stands quickly slowly "
    "quietly red blue green old young tall small over under near behind"
).split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SETTINGS: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


class Told(Silent):
    """Progress that keeps what it was told; `fail_at` raises when that stage begins."""

    def __init__(self, fail_at: str = "") -> None:
        self.fail_at = fail_at
        self.infos: list[str] = []
        self.notes: dict[str, str] = {}
        self._name = ""

    def stage(self, name: str, total: int | None = None) -> None:
        if name == self.fail_at:
            raise Killed(name)
        self._name = name

    def info(self, message: str) -> None:
        self.infos.append(message)

    def done(self, note: str = "") -> None:
        self.notes[self._name] = note


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` sees it."""


def model_folder(path: Path, *, labels: tuple[str, ...] = (), seed: int = 0) -> Path:
    """Save a random two-layer BERT with a word tokenizer; with `labels`, a classifier."""
    torch.manual_seed(seed)
    named = {i: name for i, name in enumerate(labels)}
    extra: dict[str, Any] = {"num_labels": len(labels), "id2label": named} if labels else {}
    config = transformers.BertConfig(**SETTINGS, **extra)
    cls = transformers.BertForSequenceClassification if labels else transformers.BertModel
    module = cls(config)
    with torch.no_grad():  # an untrained model hardly tells texts apart
        for name, value in module.named_parameters():
            if value.dim() == 2:
                value.mul_(4.0)
            elif "bias" in name:
                value.normal_(0.0, 0.1)
    module.save_pretrained(path)
    save_tokenizer(path, inputs=["input_ids", "token_type_ids", "attention_mask"])
    return path


def save_tokenizer(path: Path, *, inputs: list[str]) -> None:
    """A tokenizer of whole words."""
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=inputs,
    ).save_pretrained(path)


def sentences(count: int, *, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(count)]


def pairs_file(path: Path, rows: int = 120) -> Path:
    """Sentence pairs with a similarity: the share of words in common."""
    texts = sentences(2 * rows)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sentence1", "sentence2", "score"])
        for a, b in zip(texts[::2], texts[1::2], strict=True):
            x, y = set(a.split()), set(b.split())
            writer.writerow([a, b, round(5 * len(x & y) / len(x | y), 3)])
    return path


def labels_file(path: Path, labels: tuple[str, ...], rows: int = 160) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for i, text in enumerate(sentences(rows)):
            writer.writerow([text, labels[i % len(labels)]])
    return path


def fake_clock(patch: pytest.MonkeyPatch) -> None:
    """Make an inference take a time that depends on the bytes of weights in the graph alone.

    Graphs still run for real where their outputs are read.
    """
    really = SessionRunner.__init__

    def open_session(self: Any, model: Path | bytes, **rest: Any) -> None:
        really(self, model, **rest)
        content = model if isinstance(model, bytes) else model.read_bytes()
        weights = onnx.load_from_string(content).graph.initializer
        size = sum(len(t.raw_data) for t in weights if t.dims and t.name.find("embed") < 0)
        self.ms = 0.5 + size / 40_000
        self.jitter = itertools.cycle((1.0, 1.002, 0.999, 1.001, 0.998))

    patch.setattr(SessionRunner, "__init__", open_session)
    patch.setattr(SessionRunner, "run", lambda self: self.ms * next(self.jitter))
    patch.setattr(whole_models, "MANY_POINTS", whole_models.CORRECTION_POINTS)  # a clock that does
    # not err needs no more
    keep_timing_here(patch)


def small_effort(patch: pytest.MonkeyPatch) -> None:
    small = replace(
        EFFORTS["quick"], calibration_texts=64, search_texts=24, confirm_texts=48, trials=12
    )
    patch.setitem(EFFORTS, "quick", small)


def request(model: Path, data: Path | None, out: Path | None, cache: Path, **rest: Any) -> Request:
    defaults: dict[str, Any] = {"effort": "quick", "sequence_length": 16, "speedup": 2.5}
    return Request(
        model=str(model),
        data=None if data is None else str(data),
        output=out,
        cache_dir=cache,
        **(defaults | rest),
    )


def keep_timing_here(patch: pytest.MonkeyPatch) -> None:
    """Time graphs in this process, where a test has replaced how."""

    def start(self: TimingProcess, runtime: str) -> None:
        self._runtime = RUNNERS[runtime]

    def load(self: TimingProcess, model: bytes, *, workload: Workload) -> SessionRunner:
        return self._runtime(model, workload=workload)

    patch.setattr(TimingProcess, "__init__", start)
    patch.setattr(TimingProcess, "load", load)
