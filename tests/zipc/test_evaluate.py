"""Batches, pooling, the oracle and the metric, on tiny models whose outputs are known by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from zipc.core.errors import UsageError
from zipc.data import Row, Splits
from zipc.evaluate import (
    Evaluator,
    Pooling,
    count_truncated,
    make_evaluator,
    pool,
    read_pooling,
    tokenize_batches,
)

WORDS = [f"w{i}" for i in range(40)]
TABLE = np.random.default_rng(0).normal(size=(44, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    base.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


class TableModel(torch.nn.Module):
    """A lookup table for an encoder: the hidden state of a token is its row."""

    def __init__(self, table: np.ndarray = TABLE) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.from_numpy(table.copy()))

    def forward(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None
    ) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": self.table[input_ids]}


def table_onnx(
    table: np.ndarray = TABLE, *, logits: bool = False, batch_max: bool = False
) -> bytes:
    """The same as a graph; `logits` sums the rows, `batch_max` scales by the largest in a batch."""
    output = "logits" if logits else "last_hidden_state"
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    if logits:
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["m", "two"], ["mask3"]),
            helper.make_node("Mul", ["rows", "mask3"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "one"], [output], keepdims=0),
        ]
    elif batch_max:
        nodes += [
            helper.make_node("ReduceMax", ["rows"], ["top"], keepdims=1),
            helper.make_node("Add", ["rows", "top"], [output]),
        ]
    else:
        nodes += [helper.make_node("Identity", ["rows"], [output])]
    shape = ["b", "c"] if logits else ["b", "s", table.shape[1]]
    graph = helper.make_graph(
        nodes,
        "table",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.array([2]), "two"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def splits_of(rows: list[Row], task: Any, labels: tuple[str, ...] = ()) -> Splits:
    cut = tuple(rows)
    return Splits(
        calibration=cut,
        search=cut,
        dev=cut,
        test=cut,
        task=task,
        labels=labels,
        description="",
        sha256="",
    )


def sentences(n: int, seed: int = 0, longest: int = 9) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(n)]


def pairs(n: int) -> list[Row]:
    rng = np.random.default_rng(5)
    two = zip(sentences(n, 1), sentences(n, 2), strict=True)
    return [Row(texts, float(rng.integers(0, 6))) for texts in two]


def model_folder(path: Path, **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps({"model_type": "bert", **config}))
    return path


def evaluator_of(folder: Path, tokenizer: Any, splits: Splits, **options: Any) -> Evaluator:
    options = {"has_logits": False, "max_length": 16, **options}
    return make_evaluator(folder, tokenizer, splits, **options)


def embedding(text: str, table: np.ndarray = TABLE) -> np.ndarray:
    """Mean over [CLS] words [SEP], computed from the words themselves."""
    ids = [2, *(4 + WORDS.index(word) for word in text.split()), 3]
    return table[ids].astype(np.float64).mean(0)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 7), st.sampled_from([None, 12, 40]), st.integers(4, 12))
def test_batches_hold_every_text_once_and_respect_their_bounds(
    tokenizer: Any, n: int, batch_size: int, max_tokens: int | None, max_length: int
) -> None:
    texts = sentences(n, seed=n)
    batches = tokenize_batches(
        tokenizer, texts, max_length=max_length, batch_size=batch_size, max_tokens=max_tokens
    )
    seen = np.concatenate([batch.indices for batch in batches])
    assert sorted(seen) == list(range(n))
    lengths = np.concatenate([batch.attention_mask.sum(1) for batch in batches])
    assert (np.diff(lengths) >= 0).all()
    for batch in batches:
        rows, width = batch.input_ids.shape
        assert rows <= batch_size
        assert width <= max_length
        assert max_tokens is None or rows == 1 or rows * width <= max_tokens
        for i, ids, mask in zip(batch.indices, batch.input_ids, batch.attention_mask, strict=True):
            words = [4 + WORDS.index(word) for word in texts[i].split()]
            assert ids[mask == 1].tolist() == [2, *words[: max_length - 2], 3]
            assert (ids[mask == 0] == 0).all()
    assert count_truncated(batches) == sum(len(t.split()) + 2 > max_length for t in texts)


def test_pairs_are_encoded_together_with_token_types(tokenizer: Any) -> None:
    (batch,) = tokenize_batches(tokenizer, [("w0 w1", "w2"), ("w3", "w4")], max_length=16)
    assert batch.token_type_ids is not None
    assert batch.indices.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [[2, 7, 3, 8, 3, 0], [2, 4, 5, 3, 6, 3]]
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling_ignores_padding_in_torch_and_numpy(mode: Any, normalize: bool) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    hidden[mask == 0] = 100.0
    reduce = {"mean": lambda h: h.mean(0), "cls": lambda h: h[0], "max": lambda h: h.max(0)}[mode]
    expected = np.stack([reduce(h[m == 1]) for h, m in zip(hidden, mask, strict=True)])
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    pooling = Pooling(mode, normalize)
    np.testing.assert_allclose(pool(hidden, mask, pooling), expected, rtol=1e-5)
    found = pool(torch.from_numpy(hidden), torch.from_numpy(mask), pooling)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def write_modules(folder: Path, pooling: dict[str, Any], *extra: str) -> None:
    kinds = ["Transformer", "Pooling", *extra]
    paths = ["", "1_Pooling", *(f"{i + 2}_{kind}" for i, kind in enumerate(extra))]
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in zip(paths, kinds, strict=True)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_pooling_is_read_from_the_model_folder(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling(
        "mean", False, "default: the model folder does not say"
    )
    assert read_pooling(tmp_path, has_logits=True).mode == "logits"
    write_modules(tmp_path, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    assert read_pooling(tmp_path) == Pooling("cls", False, "modules.json")
    write_modules(tmp_path, {"pooling_mode": "max"}, "Dense", "Normalize")
    assert read_pooling(tmp_path) == Pooling("max", True, "modules.json; without its Dense module")
    write_modules(tmp_path, {"pooling_mode_lasttoken": True})
    with pytest.raises(UsageError, match="asks for the pooling 'lasttoken'"):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text('[{"path"')
    with pytest.raises(UsageError, match="cannot be read"):
        read_pooling(tmp_path)


def test_spearman_of_torch_and_onnx_is_that_of_the_words(tmp_path: Path, tokenizer: Any) -> None:
    rows = pairs(60)
    evaluator = evaluator_of(model_folder(tmp_path), tokenizer, splits_of(rows, "similarity"))
    cosines = [cosine(embedding(r.texts[0]), embedding(r.texts[1])) for r in rows]
    expected = 100 * spearmanr(cosines, [row.label for row in rows]).statistic
    model = TableModel().train()
    from_torch = evaluator.score_torch(model, rows, batch_size=7)
    from_onnx = evaluator.score_onnx(table_onnx(), rows)
    assert evaluator.metric == "spearman"
    assert evaluator.split_name == "test"
    assert from_torch.value == pytest.approx(expected) == from_onnx.value
    np.testing.assert_allclose(from_onnx.per_row[:, 0], cosines, atol=1e-6)
    assert from_onnx.n == 60
    assert model.training


def test_accuracy_follows_the_class_order_of_the_model(tmp_path: Path, tokenizer: Any) -> None:
    texts = sentences(50)
    folder = model_folder(tmp_path, id2label={"0": "Neutral", "1": "Bad", "2": "Good"})
    table = TABLE[:, :3]
    names = ("Neutral", "Bad", "Good")
    right = [
        names[int(np.argmax(embedding(text, table)))].lower() for text in texts
    ]  # the sum of rows has the same largest class as their mean
    rows = [Row((t,), right[i] if i >= 10 else "bad") for i, t in enumerate(texts)]
    splits = splits_of(rows, "classification", ("bad", "good", "neutral"))
    evaluator = evaluator_of(folder, tokenizer, splits, has_logits=True)
    expected = 100 * np.mean([row.label == r for row, r in zip(rows, right, strict=True)])
    result = evaluator.score_onnx(table_onnx(table, logits=True), rows)
    assert evaluator.metric == "accuracy"
    assert result.value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("config", "labels", "message"),
    [
        ({"id2label": {"0": "yes", "1": "no"}}, ("no", "perhaps"), "does not know: perhaps"),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ("a", "b", "c"), "without names"),
        ({"id2label": {"0": "yes", "1": "no"}}, ("0", "1", "2"), "does not know"),
    ],
)
def test_labels_that_do_not_match_the_classes_are_refused(
    tmp_path: Path, tokenizer: Any, config: Any, labels: tuple[str, ...], message: str
) -> None:
    rows = [Row((t,), labels[i % len(labels)]) for i, t in enumerate(sentences(9))]
    splits = splits_of(rows, "classification", labels)
    with pytest.raises(UsageError, match=message):
        evaluator_of(model_folder(tmp_path, **config), tokenizer, splits, has_logits=True)


def test_a_label_beyond_the_logits_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = [Row((t,), 1 + i % 3) for i, t in enumerate(sentences(9))]
    splits = splits_of(rows, "classification", ("1", "2", "3"))
    evaluator = evaluator_of(model_folder(tmp_path), tokenizer, splits, has_logits=True)
    with pytest.raises(UsageError, match="class 3 and the model 3 classes"):
        evaluator.score_onnx(table_onnx(TABLE[:, :3], logits=True), rows)


def test_one_logit_is_a_regression_head(tmp_path: Path, tokenizer: Any) -> None:
    rows = pairs(40)
    folder = model_folder(tmp_path, id2label={"0": "LABEL_0"})
    splits = splits_of(rows, "similarity")
    evaluator = evaluator_of(folder, tokenizer, splits, has_logits=True, max_length=32)
    sums = [TABLE[2, 0] + 2 * TABLE[3, 0] for _ in rows]
    for i, row in enumerate(rows):
        sums[i] += sum(TABLE[4 + WORDS.index(w), 0] for text in row.texts for w in text.split())
    result = evaluator.score_onnx(table_onnx(TABLE[:, :1], logits=True), rows)
    assert result.value == pytest.approx(100 * spearmanr(sums, [r.label for r in rows]).statistic)
    dense = np.array([[1.0], [3.0]])
    assert evaluator.oracle(dense, dense + 0.5) == pytest.approx(0.25 / 1.0)


def test_oracle_is_cosine_loss_or_kl_and_zero_for_the_dense(tmp_path: Path, tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    dense, other = rng.normal(size=(2, 20, 6)).astype(np.float32)
    folder = model_folder(tmp_path)
    unlabelled = splits_of([Row((t,)) for t in sentences(20)], "none")
    embeddings = evaluator_of(folder, tokenizer, unlabelled)
    expected = np.mean([1 - cosine(a, b) for a, b in zip(dense, other, strict=True)])
    assert embeddings.oracle(dense, torch.from_numpy(other)) == pytest.approx(expected, rel=1e-5)
    logits = evaluator_of(folder, tokenizer, unlabelled, has_logits=True)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (dense, other))
    expected = (p * np.log(p / q)).sum(1).mean()
    assert logits.oracle(dense, other) == pytest.approx(expected, rel=1e-5)
    for evaluator in (embeddings, logits):
        assert evaluator.oracle(dense, dense) == pytest.approx(0, abs=1e-6)
        assert evaluator.oracle(dense, np.full_like(dense, np.nan)) == float("inf")
        with pytest.raises(UsageError, match="NaN"):
            evaluator.oracle(np.full_like(dense, np.nan), dense)


def test_without_labels_the_metric_is_agreement_with_the_dense_model(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [Row((text,)) for text in sentences(30)]
    evaluator = evaluator_of(model_folder(tmp_path), tokenizer, splits_of(rows, "none"))
    assert evaluator.metric == "agreement"
    assert any("agreement" in note and "no labels" in note for note in evaluator.notes)
    dense = evaluator.score_onnx(table_onnx(), rows, reference="self")
    assert dense.value == pytest.approx(100)
    changed = TABLE + np.random.default_rng(1).normal(size=TABLE.shape).astype(np.float32)
    result = evaluator.score_onnx(table_onnx(changed), rows, reference=dense)
    texts = dict.fromkeys(row.texts[0] for row in rows)
    expected = np.mean([cosine(embedding(t), embedding(t, changed)) for t in texts])
    assert result.value == pytest.approx(100 * expected, abs=1e-4)
    with pytest.raises(ValueError, match="reference"):
        evaluator.score_onnx(table_onnx(changed), rows)


def test_a_metric_that_does_not_fit_is_refused_with_those_that_do(
    tmp_path: Path, tokenizer: Any
) -> None:
    splits = splits_of(pairs(9), "similarity")
    folder = model_folder(tmp_path)
    with pytest.raises(UsageError, match="that fit: spearman, pearson, agreement"):
        evaluator_of(folder, tokenizer, splits, metric="accuracy")
    with pytest.raises(UsageError, match="Did you mean 'spearman'"):
        evaluator_of(folder, tokenizer, splits, metric="sperman")


def test_deviation_of_a_sentence_alone_is_seen(tmp_path: Path, tokenizer: Any) -> None:
    rows = pairs(40)
    evaluator = evaluator_of(model_folder(tmp_path), tokenizer, splits_of(rows, "similarity"))
    assert evaluator.sentence_alone_deviation(table_onnx(), rows) < 1e-6
    assert evaluator.sentence_alone_deviation(table_onnx(batch_max=True), rows) > 1e-3


def test_truncated_texts_are_counted_in_the_notes(tmp_path: Path, tokenizer: Any) -> None:
    rows = [Row((" ".join(WORDS[: i + 1]),)) for i in range(20)]
    folder = model_folder(tmp_path)
    evaluator = evaluator_of(folder, tokenizer, splits_of(rows, "none"), max_length=12)
    assert "10 of 20 test texts are cut at 12 tokens" in evaluator.notes


def test_models_that_cannot_be_scored_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    rows = pairs(9)
    evaluator = evaluator_of(model_folder(tmp_path), tokenizer, splits_of(rows, "similarity"))
    with pytest.raises(UsageError, match="cannot load the model"):
        evaluator.score_onnx(b"not a graph", rows)
    with pytest.raises(UsageError, match="no output 'last_hidden_state', only logits"):
        evaluator.score_onnx(table_onnx(logits=True), rows)
    broken = np.full_like(TABLE, np.nan)
    with pytest.raises(UsageError, match="NaN"):
        evaluator.score_onnx(table_onnx(broken), rows)
    with pytest.raises(UsageError, match="NaN"):
        evaluator.score_torch(TableModel(broken), rows)


USER_FILE = """
def lengths(predict, rows):
    vectors = predict([row.texts[0] for row in rows])
    return float(vectors.shape[0] + vectors.shape[1] / 100)

def fails(predict, rows):
    return rows[0].nothing

def wrong(predict, rows):
    return "good"

def endless(predict, rows):
    return float("nan")
"""


def test_user_function_gets_predict_and_rows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "mine.py").write_text(USER_FILE)
    rows, folder = pairs(9), model_folder(tmp_path)

    def make(name: str, **options: Any) -> Evaluator:
        source = f"{tmp_path / 'mine.py'}:{name}"
        splits = splits_of(rows, "similarity")
        return evaluator_of(folder, tokenizer, splits, user_function=source, **options)

    evaluator = make("lengths")
    result = evaluator.score_onnx(table_onnx(), rows)
    assert evaluator.metric == "mine.py:lengths"
    assert result.per_row.shape == (0, 2)
    assert result.value == pytest.approx(9.06)
    for name, message in [
        ("fails", r"mine.py:fails raised AttributeError: .*\n  mine\.py, line 7, in fails: "),
        ("wrong", "mine.py:wrong gave 'good', not a number"),
        ("endless", "mine.py:endless gave nan"),
    ]:
        with pytest.raises(UsageError, match=message):
            make(name).score_onnx(table_onnx(), rows)
    with pytest.raises(UsageError, match=r"no function 'length'\. Did you mean 'lengths'"):
        make("length")
    with pytest.raises(UsageError, match="not both"):
        make("lengths", metric="spearman")


@pytest.mark.parametrize(
    ("source", "message"),
    [("nothing", "path/to/file.py:function"), ("nowhere.py:f", "no file nowhere.py")],
)
def test_user_function_that_is_not_there_is_refused(
    tmp_path: Path, tokenizer: Any, source: str, message: str
) -> None:
    splits = splits_of(pairs(9), "similarity")
    with pytest.raises(UsageError, match=message):
        evaluator_of(model_folder(tmp_path), tokenizer, splits, user_function=source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import nothing_of_this_name", r"ModuleNotFoundError.*\n  bad\.py, line 2, in "),
        ("raise SystemExit(0)", r"SystemExit: 0\n  bad\.py, line 2, in "),
    ],
)
def test_user_file_that_does_not_import_is_refused(
    tmp_path: Path, tokenizer: Any, line: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text(f"x = 1\n{line}\n")
    splits = splits_of(pairs(9), "similarity")
    with pytest.raises(UsageError, match=message):
        evaluator_of(
            model_folder(tmp_path), tokenizer, splits, user_function=f"{tmp_path}/bad.py:f"
        )
