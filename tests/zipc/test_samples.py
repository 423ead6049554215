"""Arrays as data: how they are fed, cut and judged, against figures worked out by hand."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tests.tiny_sources import (
    IDS,
    EachPixel,
    Lookup,
    MeanColour,
    TwoHeads,
    each_pixel_onnx,
    lookup_onnx,
    mean_colour_onnx,
    request_of,
    source_of,
    two_heads_onnx,
)
from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.core.shapes import parse_input_shapes
from zipc.core.types import InputSpec
from zipc.model_source import SourceModel
from zipc.samples import Samples, describe_data, inputs_of_rows, judges, open_samples
from zipc.samples.rows import RowSamples

VECTOR = InputSpec("x", "float32", ("batch", 5))
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(3, 4)).astype(np.float32)
OTHER = WEIGHT + RNG.normal(size=WEIGHT.shape).astype(np.float32) / 2
TABLE = RNG.normal(size=(11, 11)).astype(np.float32)
MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])


def images(rows: int, seed: int = 0, side: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, side, side, 3), np.uint8)


def logits_of(pictures: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return ((pictures / 255 - MEAN) / STD).mean((1, 2)) @ weight


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> np.ndarray:
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (p_logits, q_logits))
    return (p * np.log(p / q)).sum(-1)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def picture_folder(path: Path) -> dict[str, np.ndarray]:
    """train.npz, dev.npz and test.npz; labels are what WEIGHT says for two rows of three."""
    path.mkdir(exist_ok=True)
    held = {}
    for seed, (role, rows) in enumerate({"train": 90, "dev": 20, "test": 40}.items()):
        pictures = images(rows, seed)
        labels = logits_of(pictures, WEIGHT).argmax(1)
        labels[::3] = (labels[::3] + 1) % 4
        save(path / f"{role}.npz", pixel_values=pictures, labels=labels, mean=MEAN, std=STD)
        held[role], held[f"{role}_labels"] = pictures, labels
    return held


def picture_source(**rest: Any) -> SourceModel:
    return source_of(MeanColour(WEIGHT), **rest)


def opened(source: SourceModel, data: Path, **rest: Any) -> RowSamples:
    samples = open_samples(source, request_of(data, **rest))
    assert isinstance(samples, RowSamples)
    return samples


def on_torch(
    samples: Samples, *modules: torch.nn.Module, inputs: tuple[str, ...], **draw: Any
) -> tuple[float, list[torch.Tensor]]:
    """The oracle between two modules on search rows, and what it was given."""
    drawn = samples.draw("search", **{"limit": 1000, "seed": 0, **draw})
    held = []
    with torch.no_grad():
        for module in modules:
            found = []
            for feeds in drawn.batches:
                out = module(*[feeds[name] for name in inputs])
                values = list(out.values()) if isinstance(out, dict) else out
                values = [values] if isinstance(values, torch.Tensor) else list(values)
                found.append(drawn.readout(values, feeds))
            held.append(torch.cat(found))
    return drawn.oracle(*held), held


# ------------------------------------------------------------------------------ feeding and cutting


def test_bytes_are_normalised_by_the_mean_and_std_they_come_with(tmp_path: Path) -> None:
    held = picture_folder(tmp_path)
    samples = opened(picture_source(), tmp_path)
    batches = samples.draw("calibration", limit=500, seed=0).batches
    fed = torch.cat([batch["pixel_values"] for batch in batches])
    assert fed.dtype == torch.float32
    expected = ((held["train"] / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    for picture in fed.numpy():
        assert np.abs(expected - picture).reshape(len(expected), -1).max(1).min() < 1e-5
    assert "bytes normalised by mean 0.4, 0.5, 0.6, std 0.2, 0.25, 0.3" in samples.description
    assert samples.unit == "images"


def test_without_mean_and_std_the_model_folder_says_how(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    plain = {"do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(plain))
    data = save(tmp_path / "a.npz", pixel_values=images(60))
    fed = opened(picture_source(folder=folder), data).draw("test", limit=1, seed=0).batches[0]
    assert float(fed["pixel_values"].min()) >= 0
    assert float(fed["pixel_values"].max()) <= 1
    config = {"image_mean": MEAN.tolist(), "image_std": STD.tolist()}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    other = opened(picture_source(folder=folder), data)
    assert "preprocessor_config.json" in other.description
    again = other.draw("test", limit=1, seed=0).batches[0]["pixel_values"]
    scaled = (fed["pixel_values"].numpy() - MEAN[:, None, None]) / STD[:, None, None]
    np.testing.assert_allclose(again.numpy(), scaled, atol=1e-5)


def test_floats_are_fed_as_they_are(tmp_path: Path) -> None:
    values = RNG.normal(size=(50, 3, 4, 4))
    samples = opened(picture_source(), save(tmp_path / "a.npz", pixel_values=values))
    drawn = [samples.draw(part, limit=99, seed=0).batches for part in ("calibration", "search")]
    fed = torch.cat([b["pixel_values"] for batches in drawn for b in batches]).numpy()
    rows = {row.tobytes() for row in values.astype(np.float32)}
    assert {row.tobytes() for row in fed} < rows
    assert samples.unit == "rows"


def rows_of(samples: RowSamples) -> dict[str, set[bytes]]:
    """The bytes of the rows of each part."""
    return {
        part: {row.tobytes() for row in samples.rows.feeds(items)["pixel_values"]}
        for part, items in samples.parts.items()
    }


def test_a_single_file_is_cut_by_the_bytes_of_its_rows(tmp_path: Path) -> None:
    pictures = images(300)
    pictures = np.concatenate([pictures, pictures[:100]])  # some rows twice
    data = save(tmp_path / "a.npz", pixel_values=pictures, mean=MEAN, std=STD)
    samples = opened(picture_source(), data)
    parts = rows_of(samples)
    assert parts["dev"] == parts["search"]
    for one, two in (("calibration", "search"), ("calibration", "test"), ("search", "test")):
        assert not parts[one] & parts[two]
    assert sum(len(parts[p]) for p in ("calibration", "search", "test")) == 300
    assert "cut by hash from a.npz; dev is the search part" in samples.description
    shuffled = pictures[RNG.permutation(len(pictures))]
    other = opened(
        picture_source(), save(tmp_path / "b.npz", pixel_values=shuffled, mean=MEAN, std=STD)
    )
    assert rows_of(other) == parts
    seeded = opened(picture_source(), data, seed=1)
    assert rows_of(seeded)["test"] == parts["test"]
    assert rows_of(seeded)["search"] != parts["search"]
    assert seeded.sha256 != samples.sha256


def test_a_folder_keeps_its_parts_and_test_rows_leave_train(tmp_path: Path) -> None:
    held = picture_folder(tmp_path)
    leaking = np.concatenate([held["train"], held["test"][:7]])
    labels = np.concatenate([held["train_labels"], held["test_labels"][:7]])
    save(tmp_path / "train.npz", pixel_values=leaking, labels=labels, mean=MEAN, std=STD)
    samples = opened(picture_source(), tmp_path)
    assert samples.sizes["test"] == 40
    assert samples.sizes["dev"] == 20
    assert samples.sizes["calibration"] + samples.sizes["search"] == 90
    assert "7 rows that also occur in test dropped" in samples.description
    assert describe_data(request_of(tmp_path)).endswith(samples.description.rpartition(" · ")[2])


def test_what_is_fed_is_part_of_the_hash(tmp_path: Path) -> None:
    pictures = images(60)
    found = set()
    for mean in (MEAN, MEAN + 0.1):
        data = save(tmp_path / "a.npz", pixel_values=pictures, mean=mean, std=STD)
        found.add(opened(picture_source(), data).sha256)
    assert len(found) == 2


def test_large_rows_are_drawn_in_smaller_numbers(tmp_path: Path) -> None:
    small = save(
        tmp_path / "s.npz",
        pixel_values=np.zeros((1, 3, 4, 4)) + np.arange(400)[:, None, None, None],
    )
    large = np.zeros((1, 3, 128, 128), np.float32) + np.arange(100)[:, None, None, None]
    big = save(tmp_path / "l.npz", pixel_values=large.astype(np.float32))

    def rows(data: Path, limit: int) -> int:
        size = np.load(data)["pixel_values"].shape[1:]
        source = picture_source(specs=[InputSpec("pixel_values", "float32", ("batch", *size))])
        batches = opened(source, data).draw("calibration", limit=limit, seed=0).batches
        return sum(len(batch["pixel_values"]) for batch in batches)

    assert rows(small, 100) == 100
    assert rows(big, 90) == int(90 / (3 * 128 * 128 / 2**14))
    assert rows(big, 12) == 12


# ---------------------------------------------------------------------------------------- judging


def test_image_classes_are_judged_by_kl_and_read_by_accuracy(tmp_path: Path) -> None:
    held = picture_folder(tmp_path)
    samples = opened(picture_source(task="image_classes"), tmp_path)
    assert samples.metric == "accuracy"
    before, after = samples.compare(mean_colour_onnx(WEIGHT), mean_colour_onnx(OTHER), "test")
    assert before.value == pytest.approx(100 * (1 - 14 / 40))  # every third of 40 is wrong
    wanted = logits_of(held["test"], OTHER).argmax(1) == held["test_labels"]
    assert after.value == pytest.approx(100 * wanted.mean())
    assert after.n == 40
    loss, _ = on_torch(samples, MeanColour(WEIGHT), MeanColour(OTHER), inputs=("pixel_values",))
    index = [i for _, i in samples.parts["search"]]
    pictures = held["train"][index]
    expected = kl(logits_of(pictures, WEIGHT), logits_of(pictures, OTHER)).mean()
    assert loss == pytest.approx(expected, rel=1e-4)


def test_the_dense_model_loses_nothing_and_nan_is_infinitely_bad(tmp_path: Path) -> None:
    picture_folder(tmp_path)
    samples = opened(picture_source(), tmp_path)
    names = ("pixel_values",)
    dense, broken = MeanColour(WEIGHT), MeanColour(np.full_like(WEIGHT, np.nan))
    assert on_torch(samples, dense, dense, inputs=names)[0] == pytest.approx(0, abs=1e-7)
    assert on_torch(samples, dense, broken, inputs=names)[0] == math.inf
    with pytest.raises(UsageError, match="dense model gives NaN"):
        on_torch(samples, broken, dense, inputs=names)
    with pytest.raises(UsageError, match="NaN or infinity on this data"):
        samples.compare(mean_colour_onnx(WEIGHT), mean_colour_onnx(WEIGHT * np.nan), "test")


def test_without_labels_classes_are_read_by_agreement(tmp_path: Path) -> None:
    pictures = images(200)
    data = save(tmp_path / "a.npz", pixel_values=pictures, mean=MEAN, std=STD)
    samples = opened(picture_source(task="image_classes"), data)
    assert samples.metric == "agreement"
    assert "not accuracy (no labels)" in samples.notes[-1]
    before, after = samples.compare(mean_colour_onnx(WEIGHT), mean_colour_onnx(OTHER), "test")
    test = pictures[[i for _, i in samples.parts["test"]]]
    same = logits_of(test, WEIGHT).argmax(1) == logits_of(test, OTHER).argmax(1)
    assert before.value == 100
    assert after.value == pytest.approx(100 * same.mean())


def test_a_class_that_is_nan_is_none(tmp_path: Path) -> None:
    pictures = images(90)
    labels = logits_of(pictures, WEIGHT).argmax(1).astype(np.float64)
    labels[::9] = np.nan
    data = save(tmp_path / "a.npz", pixel_values=pictures, labels=labels, mean=MEAN, std=STD)
    samples = opened(picture_source(), data)
    assert samples.metric == "accuracy"
    assert samples.sizes["test"] < opened(picture_source(), data, label_column="none").sizes["test"]
    dense = mean_colour_onnx(WEIGHT)
    assert samples.compare(dense, dense, "test")[0].value == 100


def test_labels_that_are_names_follow_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    names = ["Dog", "Ant", "Cat", "Bee"]
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    pictures = images(120)
    labels = np.array([names[i].lower() for i in logits_of(pictures, WEIGHT).argmax(1)])
    arrays = {"pixel_values": pictures, "mean": MEAN, "std": STD}
    data = save(tmp_path / "a.npz", labels=labels, **arrays)
    samples = opened(picture_source(folder=folder), data)
    assert samples.metric == "accuracy"
    assert "classes: id2label" in samples.notes
    dense = mean_colour_onnx(WEIGHT)
    assert samples.compare(dense, dense, "test")[1].value == 100
    labels[0] = "cow"
    save(tmp_path / "a.npz", labels=labels, **arrays)
    with pytest.raises(UsageError, match="does not know: cow"):
        opened(picture_source(folder=folder), data)


def test_pixels_are_judged_each_and_ignored_ones_do_not_count(tmp_path: Path) -> None:
    pictures = RNG.normal(size=(80, 3, 5, 6)).astype(np.float32)
    scores = np.einsum("nchw,ck->nkhw", pictures, WEIGHT)
    labels = scores.argmax(1)
    labels[:, 0] = -100
    labels[:, 1] = (labels[:, 1] + 1) % 4
    data = save(tmp_path / "a.npz", pixel_values=pictures, labels=labels)
    spec = InputSpec("pixel_values", "float32", ("batch", 3, 5, 6))
    samples = opened(source_of(EachPixel(WEIGHT), specs=[spec]), data)
    assert samples.metric == "pixel_accuracy"
    before, after = samples.compare(each_pixel_onnx(WEIGHT), each_pixel_onnx(OTHER), "test")
    assert before.value == pytest.approx(100 * 3 / 4)  # of the four rows that count, one is wrong
    test = [i for _, i in samples.parts["test"]]
    changed = np.einsum("nchw,ck->nkhw", pictures[test], OTHER)
    hits = (changed.argmax(1) == labels[test])[:, 1:]
    assert after.value == pytest.approx(100 * hits.mean())
    loss, _ = on_torch(samples, EachPixel(WEIGHT), EachPixel(OTHER), inputs=("pixel_values",))
    search = pictures[[i for _, i in samples.parts["search"]]].transpose(0, 2, 3, 1)
    assert loss == pytest.approx(kl(search @ WEIGHT, search @ OTHER).mean(), rel=1e-4)


def token_file(path: Path, **rest: Any) -> tuple[Path, np.ndarray, np.ndarray]:
    ids = RNG.integers(0, 11, (70, 9))
    mask = (np.arange(9) < RNG.integers(2, 10, 70)[:, None]).astype(np.int64)
    return save(path / "a.npz", input_ids=ids, attention_mask=mask, **rest), ids, mask


def lookup_source(folder: Path | None = None) -> SourceModel:
    return source_of(Lookup(TABLE), specs=[IDS], task="causal_lm", folder=folder)


def test_loss_is_that_of_the_next_token_without_padding(tmp_path: Path) -> None:
    data, ids, mask = token_file(tmp_path)
    samples = opened(lookup_source(), data)
    assert samples.metric == "loss"
    before, after = samples.compare(lookup_onnx(TABLE), lookup_onnx(TABLE * 0), "test")
    terms = [
        -math.log(np.exp(TABLE[a][b]) / np.exp(TABLE[a]).sum())
        for _, i in samples.parts["test"]
        for a, b, there in zip(ids[i], ids[i][1:], mask[i][1:], strict=False)
        if there
    ]
    assert before.value == pytest.approx(np.mean(terms), rel=1e-6)
    assert after.value == pytest.approx(math.log(11), rel=1e-6)
    perplexed = opened(lookup_source(), data, metric="perplexity")
    assert perplexed.compare(lookup_onnx(TABLE * 0), lookup_onnx(TABLE), "test")[0].value == (
        pytest.approx(11, rel=1e-6)
    )


def test_labels_of_a_language_model_are_shifted_by_one(tmp_path: Path) -> None:
    data, ids, _ = token_file(tmp_path)
    plain = opened(lookup_source(), data).compare(lookup_onnx(TABLE), lookup_onnx(TABLE), "test")
    arrays = dict(np.load(data))
    save(data, **arrays, labels=ids)
    given = opened(lookup_source(), data).compare(lookup_onnx(TABLE), lookup_onnx(TABLE), "test")
    assert given[0].value == plain[0].value


def test_kl_of_tokens_leaves_padding_out(tmp_path: Path) -> None:
    data, ids, mask = token_file(tmp_path)
    samples = opened(lookup_source(), data)
    other = TABLE + RNG.normal(size=TABLE.shape).astype(np.float32)
    loss, held = on_torch(samples, Lookup(TABLE), Lookup(other), inputs=("input_ids",))
    index = [i for _, i in samples.parts["search"]]
    seen = ids[index][mask[index] == 1]
    assert len(held[0]) == len(seen)
    assert loss == pytest.approx(kl(TABLE[seen], other[seen]).mean(), rel=1e-4)


def test_what_is_kept_of_the_outputs_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _, mask = token_file(tmp_path)
    samples = opened(lookup_source(), data)
    rows = samples.sizes["search"]
    monkeypatch.setattr(judges, "KEPT", 3 * rows * 11)  # three tokens a row
    _, held = on_torch(samples, Lookup(TABLE), Lookup(TABLE), inputs=("input_ids",))
    index = [i for _, i in samples.parts["search"]]
    assert len(held[0]) == np.minimum(mask[index].sum(1), 3).sum()
    again = on_torch(samples, Lookup(TABLE), Lookup(TABLE), inputs=("input_ids",))[1]
    assert torch.equal(held[0], again[0])


def heads() -> tuple[np.ndarray, np.ndarray]:
    return (
        RNG.normal(size=(5, 2)).astype(np.float32),
        100 * RNG.normal(size=(5, 3, 2)).astype(np.float32),
    )


def test_several_outputs_are_judged_by_their_relative_error(tmp_path: Path) -> None:
    x = RNG.normal(size=(90, 5)).astype(np.float32)
    data = save(tmp_path / "a.npz", x=x)
    dense, other = heads(), heads()
    source = source_of(TwoHeads(*dense), specs=[VECTOR], outputs=["one", "two"])
    samples = opened(source, data)
    assert samples.metric == "agreement"
    loss, _ = on_torch(samples, TwoHeads(*dense), TwoHeads(dense[0], other[1]), inputs=("x",))

    def second(index: list[int], head: np.ndarray) -> np.ndarray:
        return np.einsum("nd,dbc->nbc", x[index], head).reshape(len(index), -1)

    def relative(part: Any) -> np.ndarray:
        index = [i for _, i in samples.parts[part]]
        d, c = second(index, dense[1]), second(index, other[1])
        return np.linalg.norm(c - d, axis=1) / np.linalg.norm(d, axis=1)

    assert loss == pytest.approx((relative("search") ** 2).mean() / 2, rel=1e-4)
    before, after = samples.compare(
        two_heads_onnx(*dense), two_heads_onnx(dense[0], other[1]), "test"
    )
    assert before.value == pytest.approx(100)
    expected = (1 + np.maximum(1 - relative("test"), 0)) / 2
    assert after.value == pytest.approx(100 * expected.mean(), rel=1e-5)
    with pytest.raises(UsageError, match="numbers as large as"):  # no square of them is a number
        on_torch(samples, *[TwoHeads(*(1e20 * h for h in dense))] * 2, inputs=("x",))


@pytest.mark.parametrize("metric", [None, "accuracy"])
@pytest.mark.parametrize("names", [False, True])
def test_labels_are_read_against_the_one_of_several_outputs_that_has_their_classes(
    tmp_path: Path, metric: str | None, names: bool
) -> None:
    x = RNG.normal(size=(90, 5)).astype(np.float32)
    first = RNG.normal(size=(5, 4)).astype(np.float32)
    _, second = heads()
    classes = (x @ first).argmax(1)
    labels = np.array(["ant", "bee", "cat", "dog"])[classes] if names else classes
    data = save(tmp_path / "a.npz", x=x, labels=labels)
    source = source_of(TwoHeads(first, second), specs=[VECTOR], outputs=["one", "two"])
    samples = opened(source, data, metric=metric)
    assert samples.metric == "accuracy"
    assert any("the labels are read against one, one of several" in n for n in samples.notes)
    other, worse = heads()[1], RNG.normal(size=first.shape).astype(np.float32)
    test = [i for _, i in samples.parts["test"]]
    hits = (x[test] @ worse).argmax(1) == classes[test]
    before, after = samples.compare(
        two_heads_onnx(first, second), two_heads_onnx(worse, other), "test"
    )
    assert (before.value, after.value) == (100, pytest.approx(100 * hits.mean()))
    loss, _ = on_torch(samples, TwoHeads(first, second), TwoHeads(first, other), inputs=("x",))
    assert loss > 0  # the search keeps the other output, too


def test_labels_that_are_of_none_of_several_outputs_are_told(tmp_path: Path) -> None:
    x = RNG.normal(size=(90, 5)).astype(np.float32)
    data = save(tmp_path / "a.npz", x=x, labels=np.arange(90) % 7)
    source = source_of(TwoHeads(*heads()), specs=[VECTOR], outputs=["one", "two"])
    samples = opened(source, data)
    assert samples.metric == "agreement"
    told = r"none of several outputs: one \(2,\), two \(3, 2\).*--eval"
    assert re.search(told, " ".join(samples.notes))
    with pytest.raises(UsageError, match=told):
        opened(source, data, metric="accuracy")


@pytest.mark.parametrize(
    ("shapes", "labels", "metric", "wanted"),
    [
        ([("cls", (10,)), ("reg", (1,))], np.arange(10), None, "cls"),
        ([("cls", (10,)), ("reg", (1,))], np.arange(10), "spearman", "reg"),
        ([("reg", (1,)), ("cls", (10,))], np.arange(10), None, "cls"),
        ([("reg", (1,)), ("embedding", (384,))], np.arange(10), None, "reg"),
        ([("reg", (1,)), ("cls", (384,))], np.arange(10), "accuracy", "cls"),
        ([("fine", (20,)), ("coarse", (10,))], np.arange(10), None, "coarse"),
        ([("out", (3, 4, 4)), ("aux", (3, 4, 4))], np.full((9, 4, 4), 2), None, "out"),
        ([("cls", (10,)), ("reg", (1,))], np.arange(10) / 7, None, "reg"),
        ([("a", (1,)), ("b", (1,))], np.arange(10) / 7, None, None),
    ],
)
def test_which_of_several_outputs_labels_are_of(
    shapes: list[judges.Shape], labels: np.ndarray, metric: str | None, wanted: str | None
) -> None:
    _, notes = judges.choose_judge(
        source_of(TwoHeads(*heads())), shapes, inputs={}, labels=labels, metric=metric
    )
    (note,) = notes
    assert ("none of several" if wanted is None else f"read against {wanted},") in note


def test_one_number_a_row_is_ranked(tmp_path: Path) -> None:
    pictures = RNG.normal(size=(80, 3, 4, 4)).astype(np.float32)
    labels = RNG.normal(size=80)
    column = WEIGHT[:, :1]
    data = save(tmp_path / "a.npz", pixel_values=pictures, labels=labels)
    source = source_of(MeanColour(column), task="regression")
    samples = opened(source, data)
    assert samples.metric == "spearman"
    graph = mean_colour_onnx(column)
    test = [i for _, i in samples.parts["test"]]
    scores = (pictures[test].mean((2, 3)) @ column)[:, 0]
    expected = 100 * spearmanr(scores, labels[test]).statistic
    assert samples.compare(graph, graph, "test")[0].value == pytest.approx(expected)


def test_a_row_that_depends_on_its_batch_is_told(tmp_path: Path) -> None:
    picture_folder(tmp_path)
    samples = opened(picture_source(), tmp_path)
    assert samples.deviation(mean_colour_onnx(WEIGHT), "test") < 1e-5
    assert samples.deviation(mean_colour_onnx(WEIGHT, batch_max=True), "test") > 1e-2


USER_FILE = """
def rows_and_outputs(predict, rows):
    logits = predict(rows)["logits"]
    assert len(logits) == len(rows["labels"]) == len(rows["pixel_values"])
    return float((logits.argmax(1) == rows["labels"]).sum())
"""


def test_a_users_function_gets_arrays_and_outputs_by_name(tmp_path: Path) -> None:
    picture_folder(tmp_path / "data")
    (tmp_path / "mine.py").write_text(USER_FILE)
    source = f"{tmp_path / 'mine.py'}:rows_and_outputs"
    samples = opened(picture_source(), tmp_path / "data", evaluator=source)
    assert samples.metric == "mine.py:rows_and_outputs"
    dense = mean_colour_onnx(WEIGHT)
    assert samples.compare(dense, dense, "test")[0].value == 26  # a third of 40 labels is wrong
    with pytest.raises(UsageError, match="not both"):
        opened(picture_source(), tmp_path / "data", evaluator=source, metric="f1")
    (tmp_path / "one.py").write_text("def score(rows):\n    return 0.0\n")
    with pytest.raises(UsageError, match="score is called with 2 arguments, and takes others"):
        opened(picture_source(), tmp_path / "data", evaluator=f"{tmp_path / 'one.py'}:score")


# -------------------------------------------------------------------------------------- bad input


def good() -> dict[str, Any]:
    return {
        "pixel_values": images(60),
        "labels": np.arange(60) % 4,
        "mean": MEAN,
        "std": STD,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "has no array 'pixel_values', which tiny takes"),
        ({"pixel_values": np.array([{}] * 60)}, "'pixel_values' in .* is pickled"),
        ({"labels": np.array([None] * 60)}, "'labels' in .* is pickled"),
        ({"labels": np.arange(59)}, "different numbers of rows: pixel_values 60, labels 59"),
        ({"labels": np.arange(60) % 5}, "has class 4 and tiny 4 classes"),
        ({"labels": np.arange(60) % 4 - 1}, "has class -1"),
        ({"pixel_values": images(60)[:20]}, "different numbers of rows"),
        ({"pixel_values": images(20), "labels": None}, "20 different usable rows; at least 32"),
        ({"pixel_values": np.repeat(images(1), 60, 0)}, "1 different usable rows"),
        ({"pixel_values": np.array(3.0)}, "is one number"),
        ({"pixel_values": np.array(["a"] * 60)}, "holds <U1, not numbers"),
        ({"pixel_values": np.full((60, 3, 4, 4), np.nan)}, "NaN or infinity in 60 of 60 rows"),
        ({"pixel_values": images(60, side=6).transpose(0, 3, 1, 2)}, "only images .* may be bytes"),
        (
            {"pixel_values": np.ones((60, 5, 4, 4)) * np.arange(60).reshape(-1, 1, 1, 1)},
            "compiled for pixel_values:batchx3x4x4. Compile .* --input-shapes pixel_values:1x5x4x4",
        ),
        ({"pixel_values": np.arange(60 * 48).reshape(60, 3, 4, 4)}, "the model takes float32"),
        ({"mean": None}, "neither it nor tiny says how to normalise"),
        ({"mean": MEAN * 255}, "must be 3 numbers for pixels from 0 to 1"),
        ({"std": np.zeros(3)}, "must be more than 0"),
        ({"mean": np.zeros(2)}, "must be 3 numbers"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused_with_a_reason(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arrays = {n: v for n, v in {**good(), **change}.items() if v is not None}
    data = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        opened(picture_source(), data)


def test_damaged_files_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.npz", **good()).read_bytes()
    path = tmp_path / "a.npz"
    packed = tmp_path / "packed.npz"
    np.savez_compressed(packed, **good())
    flipped = bytearray(packed.read_bytes())
    flipped[len(flipped) // 3] ^= 0xFF
    for content in (whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            opened(picture_source(), path)
    for content in (b"", b"not a zip", pickle.dumps({"pixel_values": 1})):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"is no \.npz file .* never unpickles"):
            opened(picture_source(), path)
    with path.open("wb") as stream:
        np.save(stream, images(60))
    with pytest.raises(UsageError, match="single array"):
        opened(picture_source(), path)


def test_files_that_differ_from_each_other_are_refused(tmp_path: Path) -> None:
    picture_folder(tmp_path)
    save(tmp_path / "test.npz", pixel_values=images(40, side=5), mean=MEAN, std=STD)
    with pytest.raises(UsageError, match=r"'pixel_values' is not alike in .*dev.npz and test.npz"):
        opened(picture_source(), tmp_path)
    save(tmp_path / "test.npz", pixel_values=images(40), mean=MEAN / 2, std=STD)
    with pytest.raises(UsageError, match="different 'mean' or 'std'"):
        opened(picture_source(), tmp_path)


def test_a_metric_that_needs_labels_is_refused_without_them(tmp_path: Path) -> None:
    data = save(tmp_path / "a.npz", pixel_values=images(60), mean=MEAN, std=STD)
    with pytest.raises(UsageError, match=r"'accuracy' does not fit .* Metrics that fit: agreement"):
        opened(picture_source(), data, metric="accuracy")
    save(data, **good())
    assert opened(picture_source(), data, label_column="none").metric == "agreement"
    with pytest.raises(UsageError, match="no array 'stars' for labels"):
        opened(picture_source(), data, label_column="stars")


def test_arrays_are_described_if_they_fit_the_input_shapes_given(tmp_path: Path) -> None:
    image, table = np.zeros((60, 3, 8, 8), np.float32), np.zeros((60, 4), np.int64)
    image[:, 0, 0, 0] = np.arange(60)
    data = save(tmp_path / "a.npz", image=image, table=table, y=np.zeros(60))

    def described(shapes: str) -> str:
        request = request_of(data, input_shapes=parse_input_shapes(shapes))
        return describe_data(request)

    for fitting in ("image:1x3x8x8,table:1x4", "table:2x4:int64", "y:1x3x8x8", "x:1x3x9x9"):
        assert "image 3x8x8 float32" in described(fitting)
    for shapes, told in (
        ("image:1x3x9x9", r"row of 'image' in --data is 3x8x8, "),
        ("image:1x3x9x9,table:1x4", r"row of 'image' in --data is 3x8x8, .* image:1x3x9x9\."),
        ("image:1x3x8x8:int64,table:1x4", r"'image' in --data is float32, .* takes int64"),
        ("image:1x3x8x8,tabel:1x4", r"no array 'tabel'.*: image, table; .* inputs: image, tabel"),
    ):
        with pytest.raises(UsageError, match=told):
            described(shapes)
    save(data, x=np.arange(240, dtype=np.float32).reshape(60, 4))
    for name in ("x", "z", "y"):
        assert "4 float32" in described(f"{name}:1x4")
        with pytest.raises(UsageError, match=r"row of 'x' in --data is 4, .* for x:1x5"):
            described(f"{name}:1x5")


@pytest.mark.parametrize("name", ["y", "target", "stars"])
def test_arrays_under_other_names_are_taken_where_there_is_no_doubt(
    name: str, tmp_path: Path
) -> None:
    arrays = good()
    expected = opened(picture_source(), save(tmp_path / "a.npz", **arrays))
    renamed = {"pixel_values": "x", "labels": name}
    data = save(tmp_path / "b.npz", **{renamed.get(n, n): v for n, v in arrays.items()})
    samples = opened(picture_source(), data, label_column="stars" if name == "stars" else None)
    assert samples.metric == expected.metric == "accuracy"
    assert {"'x' is taken for pixel_values", f"'{name}' is taken for labels"} <= set(samples.notes)
    if name == "stars":  # beside labels of the usual name, before it or after
        usual = {"labels": np.zeros(len(arrays["labels"]), np.int64)}
        stars = {renamed.get(n, n): v for n, v in arrays.items()}
        for both in ({**usual, **stars}, {**stars, **usual}):
            again = opened(picture_source(), save(data, **both), label_column="stars")
            assert again.sha256 == samples.sha256
        other = {**stars, **usual}
        del other["stars"]
        assert opened(picture_source(), save(data, **other)).sha256 != samples.sha256
    doubtful = save(tmp_path / "c.npz", x=arrays["pixel_values"], z=arrays["pixel_values"])
    with pytest.raises(UsageError, match="no array 'pixel_values'"):
        opened(picture_source(), doubtful)


def test_test_rows_without_labels_are_taken_from_dev(tmp_path: Path) -> None:
    held = picture_folder(tmp_path)
    save(tmp_path / "test.npz", pixel_values=held["test"], mean=MEAN, std=STD)
    samples = opened(picture_source(), tmp_path)
    assert samples.sizes["test"] == 20
    assert "test.npz has no labels, so dev.npz is the test" in samples.description


def test_too_many_tokens_are_refused(tmp_path: Path) -> None:
    data = save(tmp_path / "a.npz", input_ids=RNG.integers(0, 11, (60, 65)))
    with pytest.raises(UsageError, match="65 tokens a row, more than the model takes"):
        opened(lookup_source(), data)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    data = save(tmp_path / "a.npz", input_ids=RNG.integers(0, 12, (60, 9)))
    with pytest.raises(UsageError, match="goes up to 11, and the model knows 0 to 10"):
        opened(lookup_source(tmp_path), data)


def test_a_module_that_fails_on_the_data_is_told(tmp_path: Path) -> None:
    data = save(tmp_path / "a.npz", **good())
    with pytest.raises(UsageError, match=r"does not run on rows .*\(2, 3, 4, 4\)"):
        opened(source_of(MeanColour(WEIGHT[:2])), data)


def test_outputs_whose_rows_are_not_first_are_refused(tmp_path: Path) -> None:
    class States(torch.nn.Module):
        """As an LSTM of one layer and two directions gives its last states."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x, -x])

    data = save(tmp_path / "a.npz", x=RNG.normal(size=(90, 5)).astype(np.float32))
    source = source_of(States(), specs=[VECTOR], outputs=["states"])
    with pytest.raises(UsageError, match=r"output states .* \(2, 3, 5\) for 3 rows"):
        opened(source, data)


def test_a_model_of_one_batch_size_is_fed_that_size(tmp_path: Path) -> None:
    held = picture_folder(tmp_path)
    source = picture_source()
    samples = opened(source, tmp_path)
    whole = samples.compare(mean_colour_onnx(WEIGHT), mean_colour_onnx(OTHER), "test")
    source.fix_batch_(7)  # as tracing does
    for batch in samples.draw("search", limit=10, seed=0).batches:
        assert len(batch["pixel_values"]) == 7
    fixed = samples.compare(mean_colour_onnx(WEIGHT), mean_colour_onnx(OTHER), "test")
    assert [r.n for r in fixed] == [len(held["test"])] * 2
    assert [r.value for r in fixed] == [r.value for r in whole]
    assert samples.deviation(mean_colour_onnx(WEIGHT), "test") is None
    assert opened(source, tmp_path).sizes == samples.sizes


def test_texts_for_a_model_that_takes_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"some words {i}" for i in range(60)))
    with pytest.raises(UsageError, match=r"takes no texts: .* \(pixel_values\) as arrays"):
        open_samples(picture_source(), request_of(tmp_path / "a.txt"))


def test_arrays_without_rows_say_no_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.zeros((0, 4), np.float32))
    with pytest.raises(UsageError, match=r"'x' in .*rows\.npz has no rows"):
        inputs_of_rows(Request(model="nets.py:net", data=str(tmp_path / "rows.npz")))
