"""Texts of a table for models that give something for every token, or that read two sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from zipc.core.request import Request
from zipc.data import Row
from zipc.model_source import SourceModel
from zipc.samples.arrays import ArrayRows
from zipc.samples.base import PARTS, Part
from zipc.samples.rows import Item, RowSamples, probe, row_samples, user_function
from zipc.samples.text import read_splits, require_tokenizer

Ids = npt.NDArray[np.int64]


def token_samples(source: SourceModel, request: Request) -> RowSamples:
    """Read the table at `request.data` as token ids, padded to the longest text.

    A decoder is given the second text of a pair, else the text itself, behind its start token.

    Raises:
        UsageError: nothing usable there, or the model has no tokenizer.
    """
    user = user_function(request.evaluator, request.metric)
    require_tokenizer(source)
    splits = read_splits(request)
    held = {part: splits.rows(part) for part in PARTS}
    length = request.sequence_length or min(128, source.max_length)
    every = [row for part in PARTS for row in held[part]]
    whole = _arrays(source, every, length)
    starts = np.cumsum([0, *(len(held[part]) for part in PARTS)]).tolist()
    spans = {part: slice(starts[i], starts[i + 1]) for i, part in enumerate(PARTS)}
    arrays = {str(p): {n: v[span] for n, v in whole.items()} for p, span in spans.items()}
    parts: dict[Part, list[Item]] = {p: [(p, i) for i in range(len(held[p]))] for p in PARTS}
    rows = ArrayRows(arrays)
    unread = [] if splits.task == "none" else ["labels are one a text: not read for this model"]
    return row_samples(
        source,
        rows,
        parts,
        shapes=probe(source, rows.feeds(parts["calibration"][:2])),
        request=request,
        user=user,
        unit="texts",
        description=f"{splits.description} · {whole['input_ids'].shape[1]} tokens each",
        sha256=hashlib.sha256(f"{splits.sha256} {length}".encode()).hexdigest(),
        notes=unread,
    )


def _arrays(source: SourceModel, rows: Sequence[Row], length: int) -> dict[str, Ids]:
    """The model's inputs, (rows, longest) each; longer texts than `length` are cut."""
    decodes = "decoder_input_ids" in source.inputs
    first = [row.texts[0] for row in rows]
    last = [row.texts[-1] for row in rows]
    second = last if len(rows[0].texts) == 2 and not decodes else None
    made = _padded(source, first, second, length)
    if decodes:
        answers = _padded(source, last, None, length)
        start = getattr(source.config, "decoder_start_token_id", None)
        start = _pad_id(source.tokenizer) if start is None else int(start)
        for name, head in (("input_ids", start), ("attention_mask", 1)):
            column = np.full((len(rows), 1), head, np.int64)
            made[f"decoder_{name}"] = np.concatenate([column, answers[name]], axis=1)[:, :length]
    wanted = {*source.inputs, "attention_mask"}
    return {name: values for name, values in made.items() if name in wanted}


def _padded(
    source: SourceModel, first: list[str], second: list[str] | None, length: int
) -> dict[str, Ids]:
    tokenizer: Any = source.tokenizer
    encoded = tokenizer(
        first, second, truncation=True, max_length=length, return_attention_mask=False
    )
    longest = max(map(len, encoded["input_ids"]))
    fills = {"input_ids": _pad_id(tokenizer), "token_type_ids": 0}
    made = {name: _filled(encoded[name], longest, fills[name]) for name in fills if name in encoded}
    ones = [[1] * len(ids) for ids in encoded["input_ids"]]
    return {**made, "attention_mask": _filled(ones, longest, 0)}


def _filled(rows: Sequence[Sequence[int]], length: int, value: int) -> Ids:
    filled = np.full((len(rows), length), value, np.int64)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return filled


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id or 0)
