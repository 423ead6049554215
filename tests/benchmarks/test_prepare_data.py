"""The converters: pixels, rotary pairs and a vocabulary come out as their descriptions say."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import prepare_data

PIECES = [*"abn ", "an", "na", "ab", " a", "ana", "ban", "nan", " ab", "anan"]
SCORES = [-9.0, -9.5, -8.0, -7.5, *(-float(i) for i in range(len(PIECES) - 4))]


def test_deltas_are_undone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), np.uint8)
    colours = images.transpose(3, 0, 1, 2).copy()
    colours[0] -= colours[1]
    colours[2] -= colours[1]
    rows = np.diff(colours, axis=2, prepend=np.zeros_like(colours[:, :, :1]))
    deltas = np.diff(rows, axis=3, prepend=np.zeros_like(rows[:, :, :, :1]))
    assert np.array_equal(prepare_data.undo_deltas(deltas), images)


def test_images_known_without_loss_are_left_out() -> None:
    labels = np.repeat([0, 1, 2], 4)  # class after class, the known ones of each first
    rest = prepare_data.others(labels, known=np.array([2, 0, 2, 2]))
    assert rest.tolist() == [1, 2, 3, 4, 5, 6, 7, 11]


def test_augmented_images_are_shifted_and_mirrored_only() -> None:
    images = np.random.default_rng(0).integers(1, 256, (40, 8, 8, 3), np.uint8)
    made = prepare_data.augmented(images, np.random.default_rng(1))
    assert made.shape == images.shape
    for one, other in zip(images, made, strict=True):
        wide = np.pad(one, ((4, 4), (4, 4), (0, 0)))
        crops = [wide[t : t + 8, s : s + 8] for t in range(9) for s in range(9)]
        assert any(np.array_equal(c, other) or np.array_equal(c[:, ::-1], other) for c in crops)


def rotated(x: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding of (positions, head) by its definition, pair by pair."""
    positions, head = x.shape
    out = torch.empty_like(x)
    for i in range(head // 2):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + head // 2)
        angle = torch.arange(positions, dtype=x.dtype) * 10000 ** (-2 * i / head)
        out[:, a] = x[:, a] * angle.cos() - x[:, b] * angle.sin()
        out[:, b] = x[:, a] * angle.sin() + x[:, b] * angle.cos()
    return out


def test_halved_queries_and_keys_give_the_same_scores() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 12, dtype=torch.float64)
    query, key = torch.randn(2, 16, 12, dtype=torch.float64)  # two heads of 8
    names = ("layers.0.attention.wq.weight", "layers.0.attention.wk.weight")
    moved = [prepare_data.halved(n, w, head=8) for n, w in zip(names, (query, key), strict=True)]
    for at in (0, 8):
        plain = [rotated(x @ w[at : at + 8].T, interleaved=True) for w in (query, key)]
        other = [rotated(x @ w[at : at + 8].T, interleaved=False) for w in moved]
        torch.testing.assert_close(other[0] @ other[1].T, plain[0] @ plain[1].T)
    value = torch.randn(16, 12)
    assert prepare_data.halved("layers.0.attention.wv.weight", value, head=8) is value


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, Any]:
    head = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256))]
    return {"tokens": [*head, *PIECES], "scores": [*[0.0] * len(head), *SCORES]}


def merged(text: str, vocabulary: dict[str, Any]) -> list[int]:
    """The best-scored neighbours first, as the data set's README describes the encoding."""
    ids = {token: i for i, token in enumerate(vocabulary["tokens"])}
    found = [ids[" "]] if text else []
    for letter in text:
        found += [ids[letter]] if letter in ids else [b + 3 for b in letter.encode()]
    while True:
        pairs = [
            vocabulary["tokens"][a] + vocabulary["tokens"][b] for a, b in itertools.pairwise(found)
        ]
        made = [(vocabulary["scores"][ids[p]], -i) for i, p in enumerate(pairs) if p in ids]
        if not made:
            return [1, *found]
        at = -max(made)[1]
        found[at : at + 2] = [ids[pairs[at]]]


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet="abn é\n", max_size=20))
def test_the_tokenizer_merges_by_score(vocabulary: dict[str, Any], text: str) -> None:
    tokenizer = prepare_data.tokenizer_of(vocabulary)
    ids = tokenizer(text)["input_ids"]
    assert ids == merged(text, vocabulary)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
