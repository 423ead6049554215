"""Texts to padded batches of token ids, sorted by length so that little padding is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Texts = str | tuple[str, ...]  # one text, or the two texts of a pair encoded together
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One padded batch; `indices` are the positions of its rows in the texts given."""

    input_ids: Ids  # (b, s)
    attention_mask: Ids  # (b, s)
    token_type_ids: Ids | None  # (b, s), where the tokenizer gives them
    indices: Ids  # (b,)
    truncated: int = 0  # rows that were longer than max_length

    @property
    def feeds(self) -> dict[str, Ids]:
        """The arrays by the name a model takes them under."""
        feeds = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            feeds["token_type_ids"] = self.token_type_ids
        return feeds


def tokenize_batches(
    tokenizer: Any,
    texts: Sequence[Texts],
    *,
    max_length: int,
    batch_size: int = 32,
    max_tokens: int | None = None,
) -> list[Batch]:
    """Tokenize texts into batches of similar length, shortest first.

    `max_tokens` bounds the padded tokens of a batch (rows x longest). Longer texts than
    `max_length` are cut, and each batch says how many of its rows were.
    """
    rows, cut = _encode(tokenizer, texts, max_length)
    lengths = np.array([len(row["input_ids"]) for row in rows], np.int64)
    order = np.argsort(lengths, kind="stable")
    batches = []
    for indices in _groups(order, lengths, batch_size, max_tokens):
        width = max(1, int(lengths[indices].max()))
        chosen = [rows[i] for i in indices]
        types = [row["token_type_ids"] for row in chosen if "token_type_ids" in row]
        pad_type = getattr(tokenizer, "pad_token_type_id", 0) or 0
        batches.append(
            Batch(
                input_ids=_pad([r["input_ids"] for r in chosen], width, tokenizer.pad_token_id),
                attention_mask=_pad([[1] * len(r["input_ids"]) for r in chosen], width, 0),
                token_type_ids=_pad(types, width, pad_type) if types else None,
                indices=indices,
                truncated=sum(int(i) in cut for i in indices),
            )
        )
    return batches


def count_truncated(batches: Sequence[Batch]) -> int:
    """Return how many texts were longer than the maximum."""
    return sum(batch.truncated for batch in batches)


def _encode(
    tokenizer: Any, texts: Sequence[Texts], max_length: int
) -> tuple[list[dict[str, list[int]]], set[int]]:
    """Return the token lists of every text, and the positions of those that were cut."""
    if not texts:
        return [], set()
    rows = _tokenize(tokenizer, texts, truncation=False)
    cut = [i for i, row in enumerate(rows) if len(row["input_ids"]) > max_length]
    if cut:
        chosen = [texts[i] for i in cut]
        again = _tokenize(tokenizer, chosen, truncation=True, max_length=max_length)
        for i, row in zip(cut, again, strict=True):
            rows[i] = row
    return rows, set(cut)


def _tokenize(tokenizer: Any, texts: Sequence[Texts], **options: Any) -> list[dict[str, list[int]]]:
    first = [text if isinstance(text, str) else text[0] for text in texts]
    second = [text[1] for text in texts if not isinstance(text, str)] or None
    encoded = tokenizer(first, second, verbose=False, return_attention_mask=False, **options)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return [{name: encoded[name][i] for name in names} for i in range(len(texts))]


def _groups(order: Ids, lengths: Ids, batch_size: int, max_tokens: int | None) -> Iterator[Ids]:
    start = 0
    while start < len(order):
        stop = min(start + batch_size, len(order))
        if max_tokens is not None:  # lengths ascend, so the last row of a batch is its widest
            while stop > start + 1 and (stop - start) * lengths[order[stop - 1]] > max_tokens:
                stop -= 1
        yield order[start:stop]
        start = stop


def _pad(rows: Sequence[Sequence[int]], width: int, value: int | None) -> Ids:
    padded = np.full((len(rows), width), value or 0, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded
