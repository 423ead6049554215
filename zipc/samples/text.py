"""Texts of a table, one or two a row, for encoders: embeddings, classes, regression."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.data import Row, Splits, load_splits
from zipc.evaluate import Evaluator, make_evaluator, pool, tokenize_batches
from zipc.metrics import EvalResult
from zipc.model_source import SourceModel
from zipc.samples.base import PARTS, Drawn, Feeds, Part

MIN_BATCH, MAX_BATCH = 16, 32  # small enough for little padding and work for every processor


@dataclass(frozen=True, slots=True)
class TextSamples:
    """The rows of a text table as `Samples`."""

    evaluator: Evaluator
    splits: Splits
    inputs: tuple[str, ...]
    unit: str = "texts"

    @property
    def metric(self) -> str:
        return self.evaluator.metric

    @property
    def description(self) -> str:
        return self.splits.description

    @property
    def notes(self) -> tuple[str, ...]:
        return self.evaluator.notes

    @property
    def sha256(self) -> str:
        return self.splits.sha256

    @property
    def sizes(self) -> Mapping[Part, int]:
        return {part: len(self.splits.rows(part)) for part in PARTS}

    def draw(self, part: Part, *, limit: int, seed: int) -> Drawn:
        """Rows drawn by seed until about `limit` texts are together."""
        evaluator = self.evaluator
        rows = self.splits.rows(part)
        rng = np.random.default_rng(seed)
        per_row = max(1, len(rows[0].texts)) if evaluator.head == "embedding" else 1
        chosen = [rows[i] for i in rng.permutation(len(rows))[: max(1, limit // per_row)]]
        texts = evaluator.texts(chosen)
        batches = tokenize_batches(
            evaluator.tokenizer,
            texts,
            max_length=evaluator.max_length,
            batch_size=min(max(len(texts) // 16, MIN_BATCH), MAX_BATCH),
            max_tokens=4096,
        )
        place = np.empty(len(texts), dtype=np.int64)
        place[np.concatenate([b.indices for b in batches])] = np.arange(len(texts))
        order = torch.from_numpy(place)  # row of each text in the concatenated batches
        pairs = torch.from_numpy(_pairs(chosen, texts)) if evaluator.head == "embedding" else None
        feeds: list[Feeds] = [
            {n: torch.from_numpy(np.asarray(b.feeds[n])) for n in self.inputs if n in b.feeds}
            for b in batches
        ]

        def readout(outputs: Sequence[Tensor], feeds: Mapping[str, Tensor]) -> Tensor:
            return pool(outputs[0], feeds["attention_mask"], evaluator.pooling)

        def oracle(dense: Tensor, candidate: Tensor) -> float:
            return evaluator.oracle(dense[order], candidate[order], pairs=pairs)

        return Drawn(feeds, readout, oracle)

    def compare(
        self, dense: bytes, compiled: bytes, part: Part, *, runtime: str = "onnxruntime"
    ) -> tuple[EvalResult, EvalResult]:
        rows = self.splits.rows(part)
        score = functools.partial(self.evaluator.score_onnx, rows=rows, runtime=runtime)
        before = score(dense, reference="self")
        return before, score(compiled, reference=before)

    def deviation(self, model: bytes, part: Part, *, runtime: str = "onnxruntime") -> float:
        rows = self.splits.rows(part)
        return self.evaluator.sentence_alone_deviation(model, rows, runtime=runtime)


def text_samples(source: SourceModel, request: Request) -> TextSamples:
    """Read the table at `request.data` for an encoder.

    Raises:
        UsageError: nothing usable there, or the model does not take texts.
    """
    require_tokenizer(source)
    assert source.folder is not None  # tokenizers come with folders
    splits = read_splits(request)
    evaluator = make_evaluator(
        source.folder,
        source.tokenizer,
        splits,
        metric=request.metric,
        user_function=request.evaluator,
        has_logits=source.has_logits,
        max_length=source.max_length,
    )
    return TextSamples(evaluator, splits, tuple(source.inputs))


def require_tokenizer(source: SourceModel) -> None:
    """Refuse a model that texts cannot be fed to.

    Raises:
        UsageError: it takes no token ids, or its folder has no tokenizer.
    """
    if source.tokenizer is None or "input_ids" not in source.inputs:
        why = "has no tokenizer" if "input_ids" in source.inputs else "takes no texts"
        raise UsageError(
            f"{source.source} {why}: the texts of --data cannot be read. Pass the model's inputs "
            f"({', '.join(source.inputs)}) as arrays in an .npz file instead."
        )


def describe_texts(request: Request) -> str:
    """One line on the columns and parts of the table at `request.data`."""
    return read_splits(request).description


def read_splits(request: Request) -> Splits:
    """Read and cut the table at `request.data`.

    Raises:
        UsageError: see `data.load_splits`.
    """
    return load_splits(
        str(request.data),
        text_columns=request.text_columns,
        label_column=request.label_column,
        seed=request.seed,
    )


def _pairs(rows: Sequence[Row], texts: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The data's own pairs; where it has single texts, each text with eight others."""
    place = {text: i for i, text in enumerate(texts)}
    if len(rows[0].texts) == 2:
        return np.array([[place[t] for t in r.texts] for r in rows], dtype=np.int64)
    index = np.arange(len(texts))
    shifts = range(1, min(9, len(texts)))
    return np.concatenate([np.stack([index, np.roll(index, s)], 1) for s in shifts])
