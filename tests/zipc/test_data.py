"""Reading data: every file kind, header or not, splits by role or by hash, and no leaks."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import pytest

from zipc.core.errors import UsageError
from zipc.data import Row, Splits, load_splits

PAIRS = [
    (f"A man plays tune {i}.", f"Somebody, a man, plays {i}", i % 6 + 0.25) for i in range(200)
]
SINGLES = [(f"the film number {i} was shown", i % 2) for i in range(200)]


def write_csv(path: Path, rows: list, header: tuple[str, ...] = (), **options: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, **options)
        writer.writerows([header, *rows] if header else rows)
    return path


def everything(splits: Splits) -> list[Row]:
    return [*splits.calibration, *splits.search, *splits.test]


def keys(rows: tuple[Row, ...]) -> set[tuple[str, ...]]:
    return {row.texts for row in rows}


@pytest.mark.parametrize("header", [(), ("sentence1", "sentence2", "score")])
@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".csv", ";")])
def test_pairs_with_float_labels_are_similarity(
    tmp_path: Path, header: tuple[str, ...], suffix: str, delimiter: str
) -> None:
    path = write_csv(tmp_path / f"data{suffix}", PAIRS, header, delimiter=delimiter)
    splits = load_splits(str(path))
    assert splits.task == "similarity"
    assert splits.labels == ()
    assert sorted((*r.texts, r.label) for r in everything(splits)) == sorted(PAIRS)
    assert (", ".join(header[:2]) or "column 1, column 2") in splits.description


def test_other_files_give_the_same_rows(tmp_path: Path) -> None:
    plain = load_splits(str(write_csv(tmp_path / "plain.csv", SINGLES, ("sentence", "label"))))
    content = (tmp_path / "plain.csv").read_bytes()
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + content)
    (tmp_path / "unix.csv").write_bytes(content.replace(b"\r\n", b"\n"))
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(content))
    lines = [json.dumps({"id": i, "sentence": t, "label": y}) for i, (t, y) in enumerate(SINGLES)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    for name in ("bom.csv", "unix.csv", "packed.csv.gz", "lines.jsonl"):
        other = load_splits(str(tmp_path / name))
        assert other.sha256 == plain.sha256, name
    assert plain.task == "classification"
    assert plain.labels == ("0", "1")


def test_txt_is_one_text_a_line_without_labels(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(text for text, _ in SINGLES))
    splits = load_splits(str(tmp_path / "a.txt"))
    assert splits.task == "none"
    assert len(everything(splits)) == 200
    assert "no labels" in splits.description


def test_quotes_in_tsv_are_text_unless_they_come_in_pairs(tmp_path: Path) -> None:
    rows = [f'"quoted start of {i}\t{i % 2}' for i in range(50)] + ['he said "no" to it\t1']
    (tmp_path / "a.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    texts = {row.texts[0] for row in everything(load_splits(str(tmp_path / "a.tsv")))}
    assert '"quoted start of 7' in texts
    assert 'he said "no" to it' in texts


def test_header_is_told_from_a_first_row(tmp_path: Path) -> None:
    words = [(f"show me flight {i}", ("book", "ask")[i % 2]) for i in range(60)]
    named = load_splits(str(write_csv(tmp_path / "a.csv", words, ("phrase", "aim"))))
    bare = load_splits(str(write_csv(tmp_path / "b.csv", words)))
    assert named.labels == bare.labels == ("ask", "book")
    assert named.sha256 == bare.sha256
    assert "text: phrase · label: aim (2 classes)" in named.description


def test_single_file_split_is_stable_under_order_and_keeps_duplicates_together(
    tmp_path: Path,
) -> None:
    rows = [*PAIRS, *[(b.upper(), a, y) for a, b, y in PAIRS[:50]]]
    shuffled = random.Random(0).sample(rows, len(rows))
    first = load_splits(str(write_csv(tmp_path / "a.csv", rows)))
    second = load_splits(str(write_csv(tmp_path / "b.csv", shuffled)))
    for name in ("calibration", "search", "test"):
        assert keys(getattr(first, name)) == keys(getattr(second, name))
    parts = [
        {tuple(sorted(t.casefold() for t in row.texts)) for row in part}
        for part in (first.calibration, first.search, first.test)
    ]
    assert not (parts[0] & parts[1])
    assert not (parts[0] & parts[2])
    assert not (parts[1] & parts[2])


def test_single_file_split_has_the_stated_shares(tmp_path: Path) -> None:
    rows = [(f"sentence number {i} of many",) for i in range(6000)]
    splits = load_splits(str(write_csv(tmp_path / "a.csv", rows)))
    shares = [len(part) / 6000 for part in (splits.calibration, splits.search, splits.test)]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.03)
    assert splits.dev == splits.search


def test_seed_moves_calibration_and_search_but_never_test(tmp_path: Path) -> None:
    path = str(write_csv(tmp_path / "a.csv", PAIRS))
    first, second = load_splits(path, seed=0), load_splits(path, seed=1)
    assert first.test == second.test
    assert first.search != second.search
    assert first.sha256 != second.sha256


def test_folder_keeps_its_splits_and_drops_leaks(tmp_path: Path) -> None:
    header = ("sentence1", "sentence2", "score")
    leak = [(b, a, 1.0) for a, b, _ in PAIRS[190:]]  # the same pairs the other way round
    write_csv(tmp_path / "stsb-en-train.csv", [*PAIRS[:120], *leak], header)
    write_csv(tmp_path / "validation.csv", PAIRS[120:150], header)
    write_csv(tmp_path / "test.csv", PAIRS[150:], header)
    (tmp_path / "README.txt").write_text("where this comes from")
    splits = load_splits(str(tmp_path))
    assert [(*r.texts, r.label) for r in splits.test] == PAIRS[150:]
    assert [(*r.texts, r.label) for r in splits.dev] == PAIRS[120:150]
    learnt = [(*r.texts, r.label) for r in (*splits.calibration, *splits.search)]
    assert sorted(learnt) == sorted(PAIRS[:120])
    assert "10 rows that also occur in test dropped" in splits.description
    assert "test 50 (from test.csv)" in splits.description


def test_dev_is_cut_from_train_when_absent_and_is_the_test_when_test_has_no_labels(
    tmp_path: Path,
) -> None:
    header = ("sentence", "label")
    write_csv(tmp_path / "train.csv", SINGLES[:150], header)
    write_csv(tmp_path / "test.csv", SINGLES[150:], header)
    splits = load_splits(str(tmp_path))
    assert splits.dev
    assert keys(splits.dev) < {(text,) for text, _ in SINGLES[:150]}
    assert not keys(splits.dev) & (keys(splits.calibration) | keys(splits.search))
    write_csv(tmp_path / "dev.csv", SINGLES[120:150], header)
    write_csv(tmp_path / "train.csv", SINGLES[:120], header)
    write_csv(tmp_path / "test.csv", [(text,) for text, _ in SINGLES[150:]], header[:1])
    splits = load_splits(str(tmp_path))
    assert keys(splits.test) == {(text,) for text, _ in SINGLES[120:150]}
    assert "test.csv has no labels, so dev.csv is the test" in splits.description


def test_named_columns_win_over_guesses(tmp_path: Path) -> None:
    rows = [(i, f"title words {i}", f"body words {i}", i % 3, i % 2) for i in range(60)]
    path = str(write_csv(tmp_path / "a.csv", rows, ("id", "title", "body", "stars", "spam")))
    splits = load_splits(path, text_columns=("body",), label_column="spam")
    assert splits.labels == ("0", "1")
    assert splits.test[0].texts[0].startswith("body")
    unlabelled = load_splits(path, text_columns=("body", "title"), label_column="none")
    assert unlabelled.task == "none"
    assert len(unlabelled.test[0].texts) == 2


def test_rows_without_text_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [*SINGLES, ("  ", 1), ("", 0)]
    splits = load_splits(str(write_csv(tmp_path / "a.csv", rows, ("text", "label"))))
    assert len(everything(splits)) == 200
    assert "2 incomplete rows skipped" in splits.description


@pytest.mark.parametrize(
    ("labels", "pair", "task"),
    [
        ([0, 1], False, "classification"),
        (["1.0", "2.0"], False, "classification"),
        (["good", "bad"], False, "classification"),
        ([0.5, 1.25], False, "regression"),
        ([0, 1, 2], True, "classification"),
        ([0, 1, 2, 3, 4, 5], True, "similarity"),
        ([0.5, 1.0], True, "similarity"),
    ],
)
def test_task_follows_from_texts_and_labels(
    tmp_path: Path, labels: list, pair: bool, task: str
) -> None:
    rows = [
        (f"some words {i}", *([f"other words {i}"] if pair else []), labels[i % len(labels)])
        for i in range(120)
    ]
    assert load_splits(str(write_csv(tmp_path / "a.csv", rows))).task == task


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n \n", "is empty"),
        ("a.csv", b"text,label\nonly one row here,1\n", "1 different usable rows; at least 32"),
        ("a.csv", b"the same text again,1\n" * 500, "1 different usable rows"),
        ("a.csv", b"caf\xe9 au lait,1\n" * 50, "is not UTF-8"),
        ("a.csv", "some text\n".encode("utf-16-le") * 50, "zero bytes"),
        ("a.csv", b"1,2\n3,4\n" * 40, "no column of text"),
        ("a.csv", b"hello, dear, friend,1\nbye, you,0\na,b,c,d,e\n" * 40, "do not have"),
        ("a.jsonl", b'{"text": "a b"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.csv.gz", b"not gzip at all", "cannot be read"),
        ("a.parquet", b"PAR1", "is not one of"),
    ],
)
def test_unusable_files_are_refused_with_a_reason(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_splits(str(tmp_path / name))


def test_missing_path_and_folders_without_roles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file or folder"):
        load_splits(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="has no data file"):
        load_splits(str(tmp_path))
    for name in ("one.csv", "two.csv"):
        write_csv(tmp_path / name, SINGLES)
    with pytest.raises(UsageError, match="several data files"):
        load_splits(str(tmp_path))
    for name in ("train.csv", "more_train.csv"):
        write_csv(tmp_path / name, SINGLES)
    with pytest.raises(UsageError, match="two files for train"):
        load_splits(str(tmp_path))


def test_wrong_column_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = str(write_csv(tmp_path / "a.csv", SINGLES, ("sentence", "label")))
    with pytest.raises(UsageError, match=r"Did you mean 'sentence'\? Its columns: sentence, label"):
        load_splits(path, text_columns=("sentense",))


def test_ambiguous_columns_are_refused(tmp_path: Path) -> None:
    rows = [(f"some words {i}", i % 2, i % 3) for i in range(60)]
    path = str(write_csv(tmp_path / "a.csv", rows, ("phrase", "spam", "stage")))
    with pytest.raises(UsageError, match="could be the label: spam, stage"):
        load_splits(path)
    rows = [(f"some words {i}", f"other words {i}", f"more words {i}") for i in range(60)]
    with pytest.raises(UsageError, match="several columns of text"):
        load_splits(str(write_csv(tmp_path / "b.csv", rows)))
