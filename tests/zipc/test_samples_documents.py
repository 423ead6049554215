"""Running text for a language model: documents, windows, and the loss on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny_sources import Lookup, lookup_onnx, request_of, source_of
from zipc.core.errors import UsageError
from zipc.core.types import InputSpec
from zipc.model_source import SourceModel
from zipc.samples import describe_data, open_samples
from zipc.samples.rows import RowSamples

WORDS = [f"w{i}" for i in range(30)]
BOS, EOS = 0, 1
IDS = InputSpec("input_ids", "int64", ("batch", "sequence"), high=32)
TABLE = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)


def tokenizer_of(*, begins: bool = False, end: str | None = "</s>") -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *WORDS])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        base.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token=end)


def model_of(tokenizer: Any = None, **rest: Any) -> SourceModel:
    tokenizer = tokenizer_of() if tokenizer is None else tokenizer
    return source_of(Lookup(TABLE), specs=[IDS], task="causal_lm", tokenizer=tokenizer, **rest)


def opened(data: Path, source: SourceModel | None = None, length: int = 8, **rest: Any) -> Any:
    request = request_of(data, sequence_length=length, **rest)
    samples = open_samples(model_of() if source is None else source, request)
    assert isinstance(samples, RowSamples)
    return samples


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(count)]


def ids_of(text: str) -> list[int]:
    return [2 + WORDS.index(word) for word in text.split()]


def windows(samples: RowSamples, part: Any) -> dict[str, np.ndarray]:
    items = samples.parts[part]
    labels = samples.rows.labels(items)
    assert labels is not None
    return {**samples.rows.feeds(items), "labels": labels}


def told(samples: RowSamples, part: Any) -> list[int]:
    """The stream of a part, put together from its windows."""
    held = windows(samples, part)
    real = held["attention_mask"] == 1
    inputs, labels = held["input_ids"][real].tolist(), held["labels"][real].tolist()
    assert inputs[1:] == labels[:-1]  # each token is what the one before it should predict
    return [*inputs, labels[-1]]


def surprise(stream: list[int], table: np.ndarray) -> list[float]:
    rows = [np.exp(table[a]) / np.exp(table[a]).sum() for a in stream]
    return [-math.log(p[b]) for p, b in zip(rows, stream[1:], strict=False)]


def folder_of(path: Path, *, train: int = 200, test: int = 30) -> tuple[Path, list[str]]:
    held = texts(test, seed=1)
    (path / "train.txt").write_text("\n".join(texts(train)))
    (path / "test.txt").write_text("\n".join(held))
    return path, held


def test_every_token_of_the_test_documents_is_predicted_once(tmp_path: Path) -> None:
    data, held = folder_of(tmp_path)
    samples = opened(data)
    expected = [token for text in held for token in [*ids_of(text), EOS]]
    assert told(samples, "test") == expected
    assert samples.metric == "loss"
    assert samples.unit == "windows"
    assert samples.sizes["test"] == math.ceil((len(expected) - 1) / 8)
    before, after = samples.compare(lookup_onnx(TABLE), lookup_onnx(0 * TABLE), "test")
    assert before.value == pytest.approx(np.mean(surprise(expected, TABLE)), rel=1e-6)
    assert after.value == pytest.approx(math.log(32), rel=1e-6)
    assert "windows of 8" in samples.description
    assert "documents: lines" in samples.description


def test_the_last_window_is_padded_and_padding_is_masked(tmp_path: Path) -> None:
    data, held = folder_of(tmp_path)
    last = {name: value[-1] for name, value in windows(opened(data), "test").items()}
    count = (len([t for text in held for t in [*ids_of(text), EOS]]) - 1) % 8
    assert count
    assert last["attention_mask"].tolist() == [1] * count + [0] * (8 - count)
    assert (last["labels"][count:] == -100).all()
    assert (last["input_ids"][count:] == EOS).all()


@pytest.mark.parametrize(
    ("begins", "end", "expected"),
    [
        (True, "</s>", [BOS, 2, 3, BOS, 4]),
        (False, "</s>", [2, 3, EOS, 4, EOS]),
        (False, None, [2, 3, 4]),
    ],
)
def test_documents_are_set_apart_by_the_tokenizers_own_marks(
    tmp_path: Path, begins: bool, end: str | None, expected: list[int]
) -> None:
    data, _ = folder_of(tmp_path)
    (data / "test.txt").write_text("w0 w1\nw2\n" * 8)
    source = model_of(tokenizer_of(begins=begins, end=end))
    assert told(opened(data, source, length=4), "test")[: len(expected)] == expected


@pytest.mark.parametrize(
    ("separator", "name"),
    [
        ("\n", "lines"),
        ("\n\n", "separated by blank lines"),
        ("\n \n\n", "separated by blank lines"),
    ],
)
def test_documents_are_blocks_where_blank_lines_make_enough_of_them(
    tmp_path: Path, separator: str, name: str
) -> None:
    held = texts(120)
    (tmp_path / "a.txt").write_text(separator.join(f"{t}\n{t}" for t in held))
    samples = opened(tmp_path / "a.txt")
    assert f"documents: {name}" in samples.description
    streams = [told(samples, part) for part in ("calibration", "search", "test")]
    first, two = ids_of(held[0]), [*ids_of(held[0]), *ids_of(held[0])]
    whole = two if name != "lines" else [*first, EOS, *first]
    runs = [" ".join(map(str, stream)) for stream in streams]
    assert sum(" ".join(map(str, whole)) in run for run in runs) == 1


def test_an_end_of_text_mark_separates_whatever_lies_between(tmp_path: Path) -> None:
    held = texts(80)
    stories = [f"{a}\n\n{b}\n" for a, b in zip(held[::2], held[1::2], strict=True)]
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(stories))
    samples = opened(tmp_path / "a.txt")
    assert "separated by <|endoftext|>" in samples.description
    tokens = [told(samples, part) for part in ("calibration", "search", "test")]
    assert sum(stream.count(EOS) for stream in tokens) == 40


def test_documents_never_share_a_window_across_parts(tmp_path: Path) -> None:
    held = texts(300)
    (tmp_path / "a.txt").write_text("\n".join([*held, *(text.upper() for text in held[:50])]))
    lower = {text: i for i, text in enumerate(held)}
    found = []
    for part in ("calibration", "search", "test"):
        stream = told(opened(tmp_path / "a.txt"), part)
        documents: list[list[int]] = [[]]
        for token in stream:
            documents[-1].append(token)
            if token == EOS:
                documents.append([])
        found.append({tuple(d) for d in documents if any(t != EOS for t in d)})
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]
    assert sum(map(len, found)) <= len(lower)


def test_test_documents_leave_train_and_seeds_leave_test_alone(tmp_path: Path) -> None:
    data, held = folder_of(tmp_path)
    (data / "train.txt").write_text("\n".join([*texts(200), *held[:9]]))
    first, second = opened(data), opened(data, seed=1)
    assert "9 rows that also occur in test dropped" in first.description
    assert told(first, "test") == told(second, "test")
    assert told(first, "search") != told(second, "search")
    assert first.sha256 != second.sha256
    assert opened(data, length=6).sha256 != first.sha256


def test_a_column_of_a_table_holds_documents(tmp_path: Path) -> None:
    held = texts(200)
    lines = [json.dumps({"story": text, "id": i}) for i, text in enumerate(held)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    samples = opened(tmp_path / "a.jsonl")
    assert "documents: column story" in samples.description
    streams = [told(samples, part) for part in ("calibration", "search", "test")]
    assert sum(map(len, streams)) == sum(len(ids_of(text)) + 1 for text in held)
    assert describe_data(request_of(tmp_path / "a.jsonl")).startswith("text: story")


def test_a_window_counts_as_the_texts_it_is_as_long_as(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(texts(8000)))
    samples = opened(tmp_path / "a.txt", length=64)
    drawn = samples.draw("calibration", limit=100, seed=0).batches
    assert sum(len(batch["input_ids"]) for batch in drawn) == 50
    assert set(drawn[0]) == {"input_ids", "attention_mask"}


def test_oracle_is_the_kl_of_next_tokens(tmp_path: Path) -> None:
    data, _ = folder_of(tmp_path)
    samples = opened(data)
    other = TABLE + np.random.default_rng(1).normal(size=TABLE.shape).astype(np.float32)
    drawn = samples.draw("search", limit=1000, seed=0)
    outputs = [
        torch.cat([drawn.readout([torch.from_numpy(t)[f["input_ids"]]], f) for f in drawn.batches])
        for t in (TABLE, other)
    ]
    held = windows(samples, "search")
    seen = held["input_ids"][held["attention_mask"] == 1]
    p, q = (np.exp(t[seen]) / np.exp(t[seen]).sum(1, keepdims=True) for t in (TABLE, other))
    assert drawn.oracle(*outputs) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-4)


def test_agreement_is_the_share_of_equal_next_tokens(tmp_path: Path) -> None:
    data, _ = folder_of(tmp_path)
    samples = opened(data, metric="agreement")
    other = TABLE + np.random.default_rng(1).normal(size=TABLE.shape).astype(np.float32) / 2
    result = samples.compare(lookup_onnx(TABLE), lookup_onnx(other), "test")[1]
    held = windows(samples, "test")
    same = TABLE.argmax(1)[held["input_ids"]] == other.argmax(1)[held["input_ids"]]
    shares = [s[m == 1].mean() for s, m in zip(same, held["attention_mask"], strict=True)]
    assert result.value == pytest.approx(100 * np.mean(shares))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("w1 w2\n" * 500, "1 different usable rows; at least 32"),
        ("\n".join(texts(31)), "31 different usable rows"),
        ("\n".join(f"w{i % 30} w{i // 30}" for i in range(40)), "less than 2 windows of 64"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / "a.txt", length=64)


def test_what_a_language_model_cannot_read_is_refused(tmp_path: Path) -> None:
    data, _ = folder_of(tmp_path)
    with pytest.raises(
        UsageError, match=r"'spearman' does not fit .*: loss, perplexity, agreement"
    ):
        opened(data, metric="spearman")
    with pytest.raises(UsageError, match=r"A \.txt file has no columns"):
        opened(data, text_columns=("text",))
    source = model_of()
    source.tokenizer = None
    with pytest.raises(
        UsageError, match=r"has no tokenizer: .*\(input_ids\) as arrays in an \.npz"
    ):
        opened(data, source)
    (data / "dev.jsonl").write_text(json.dumps({"text": "w1 w2"}))
    with pytest.raises(UsageError, match="some plain text: use one kind"):
        opened(data)
    pairs = [json.dumps({"sentence1": f"{t} a", "sentence2": f"{t} b"}) for t in texts(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    with pytest.raises(UsageError, match="a language model reads one"):
        opened(tmp_path / "pairs.jsonl")
