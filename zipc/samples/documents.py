"""Running text for a causal language model, cut into windows that it predicts token by token.

Documents are what `<|endoftext|>` separates, else what blank lines separate, else lines: the
coarsest of these that gives enough of them to cut. Those of one part are joined, each with the
tokenizer's own marks of a beginning or an end, and cut into windows of the length timed;
so no window holds text of two parts, and every token but the first of a part is predicted once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.data import choose_columns
from zipc.model_source import SourceModel
from zipc.read_table import find_files, is_missing, read_plain, read_table
from zipc.samples.arrays import ArrayRows
from zipc.samples.base import PARTS, Part
from zipc.samples.judges import IGNORED
from zipc.samples.rows import Item, RowSamples, probe, row_samples, user_function
from zipc.samples.text import require_tokenizer
from zipc.splitting import MIN_ROWS, Cut, cut

Ids = npt.NDArray[np.int64]
SEPARATORS = {  # each finer than the one before
    "<|endoftext|>": r"<\|endoftext\|>",
    "blank lines": r"<\|endoftext\|>|\n[ \t]*\n",
    "lines": r"<\|endoftext\|>|\n",
}
FEWEST = 2  # windows of each part that is used


def document_samples(source: SourceModel, request: Request) -> RowSamples:
    """Read the text at `request.data` for a causal language model.

    Raises:
        UsageError: the model has no tokenizer, or there is too little text.
    """
    user = user_function(request.evaluator, request.metric)
    require_tokenizer(source)
    made, how = _cut(request)
    length = request.context or min(128, source.max_length)
    streams = {p: _stream(source.tokenizer, docs) for p, docs in _apart(made.parts).items()}
    windows = {p: _windows(s, length, pad=_pad_id(source.tokenizer)) for p, s in streams.items()}
    rows = ArrayRows(
        {p: {"input_ids": ids, "attention_mask": mask} for p, (ids, mask, _) in windows.items()},
        {p: labels for p, (_, _, labels) in windows.items()},
    )
    parts = _items(made.parts, {p: len(ids) for p, (ids, _, _) in windows.items()})
    _require(parts, streams, length, request)
    tokens = sum(map(len, streams.values()))
    return row_samples(
        source,
        rows,
        parts,
        shapes=probe(source, rows.feeds(parts["calibration"][:2])),
        request=request,
        user=user,
        unit="windows",
        description=f"documents: {how} · {tokens:,} tokens in windows of {length} · "
        + Cut(parts, made.notes).description,
        sha256=_digest(streams, length),
        notes=[],
    )


def _cut(request: Request) -> tuple[Cut[str], str]:
    files = find_files(Path(str(request.data)).expanduser())
    read, how = _documents(files, request)
    return cut(read, files, key=_key, labelled=None, seed=request.seed), how


def _documents(files: Mapping[str, Path], request: Request) -> tuple[dict[str, list[str]], str]:
    """The documents of each file, and what separates them."""
    tables = {r: p for r, p in files.items() if ".txt" not in p.suffixes}
    if tables and len(tables) < len(files):
        names = ", ".join(path.name for path in files.values())
        raise UsageError(f"Some of the files {names} are tables and some plain text: use one kind.")
    if tables:
        return _columns(files, request)
    if request.text_columns or request.label_column not in (None, "none"):
        raise UsageError("A .txt file has no columns: leave out --text-column and --label-column.")
    texts = {role: read_plain(path) for role, path in files.items()}
    read: dict[str, list[str]] = {}
    for name, pattern in SEPARATORS.items():
        pieces = {role: re.split(pattern, text) for role, text in texts.items()}
        read = {role: [p.strip("\n") for p in ps if p.strip()] for role, ps in pieces.items()}
        if len({_key(text) for texts_ in read.values() for text in texts_}) >= MIN_ROWS:
            return read, f"separated by {name}" if name != "lines" else name
    return read, "lines"


def _columns(files: Mapping[str, Path], request: Request) -> tuple[dict[str, list[str]], str]:
    """The cells of one column of text."""
    tables = {role: read_table(path, request.text_columns) for role, path in files.items()}
    first = tables.get("train") or next(iter(tables.values()))
    columns, _ = choose_columns(first, request.text_columns, "none")
    if len(columns) > 1:
        raise UsageError(
            f"{first.path} has the columns of text {' and '.join(columns)}; a language model reads "
            "one. Name it with --text-column."
        )
    read = {}
    for role, table in tables.items():
        if columns[0] not in table.names:
            raise UsageError(f"{table.path} has no column '{columns[0]}'.")
        cells = table.column(columns[0])
        read[role] = [str(cell) for cell in cells if not is_missing(cell)]
    return read, f"column {columns[0]}"


def _key(text: str) -> str:
    """Equal for texts that differ in spacing or case only."""
    return " ".join(text.casefold().split())


def _apart(parts: Mapping[Part, list[str]]) -> dict[Part, list[str]]:
    """The parts that have documents of their own: dev may be the search part."""
    return {p: docs for p, docs in parts.items() if p != "dev" or docs is not parts["search"]}


def _items(parts: Mapping[Part, list[str]], counts: Mapping[Part, int]) -> dict[Part, list[Item]]:
    held: dict[Part, Part] = {p: p if p in counts else "search" for p in parts}
    return {p: [(held[p], i) for i in range(counts[held[p]])] for p in PARTS}


def _stream(tokenizer: Any, documents: Sequence[str]) -> Ids:
    """All tokens of the documents, with a mark between each two where the tokenizer has one."""
    if not documents:
        return np.zeros(0, np.int64)
    marks = tokenizer("", verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    tail = [] if marks or end is None else [end]
    encoded = tokenizer(list(documents), verbose=False, return_attention_mask=False)["input_ids"]
    return np.array([token for ids in encoded for token in [*ids, *tail]], np.int64)


def _windows(stream: Ids, length: int, *, pad: int) -> tuple[Ids, Ids, Ids]:
    """Inputs, mask and next tokens, (n, length) each; the last window is filled up with padding."""
    count = max(0, -(-(len(stream) - 1) // length))
    inputs = np.full(count * length, pad, np.int64)
    labels = np.full(count * length, IGNORED, np.int64)
    mask = np.zeros(count * length, np.int64)
    real = max(0, len(stream) - 1)
    inputs[:real], labels[:real], mask[:real] = stream[:-1], stream[1:], 1
    shape = (count, length)
    return inputs.reshape(shape), mask.reshape(shape), labels.reshape(shape)


def _pad_id(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _require(
    parts: Mapping[Part, Sequence[Item]],
    streams: Mapping[Part, Ids],
    length: int,
    request: Request,
) -> None:
    names: tuple[Part, ...] = ("calibration", "search", "test")
    for part in names:
        if len(parts[part]) < FEWEST:
            raise UsageError(
                f"{request.data} gives the {part} part {len(streams[part]):,} tokens, less than "
                f"{FEWEST} windows of {length}. Pass more text with --data, or time a shorter "
                f"{'--past-length' if request.phase == 'decode' else '--sequence-length'}."
            )


def _digest(streams: Mapping[Part, Ids], length: int) -> str:
    digest = hashlib.sha256(f"windows of {length}".encode())
    for part, stream in sorted(streams.items()):
        digest.update(f"{part} {len(stream)}".encode())
        digest.update(stream.tobytes())
    return digest.hexdigest()
