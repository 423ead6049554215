"""Image folders: classes, parts, the model's own preprocessing, and files that are no images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_sources import MeanColour, mean_colour_onnx, request_of, source_of
from zipc.core.errors import UsageError
from zipc.core.types import InputSpec
from zipc.model_source import SourceModel
from zipc.samples import describe_data, images, open_samples
from zipc.samples.rows import RowSamples

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
WEIGHT = np.eye(3, dtype=np.float32)  # the class is the colour there is most of
NAMES = ["red", "green", "blue"]
RESIZED = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 8, "width": 8},
    "resample": 0,
    "image_mean": MEAN,
    "image_std": STD,
}


def picture(colour: int, seed: int, side: int = 8) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 120, (side, side, 3), np.uint8)
    pixels[..., colour] += 130
    return pixels


def class_folders(path: Path, rows: int, *, seed: int = 0, suffix: str = ".png") -> Path:
    for colour, name in enumerate(NAMES):
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(rows):
            made = picture(colour, seed=1000 * seed + 3 * i + colour)
            Image.fromarray(made).save(path / name / f"{i}{suffix}")
    return path


def model_of(path: Path, config: dict[str, Any] = RESIZED, size: int = 8) -> SourceModel:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(NAMES))}))
    (path / "preprocessor_config.json").write_text(json.dumps(config))
    spec = InputSpec("pixel_values", "float32", ("batch", 3, size, size))
    return source_of(MeanColour(WEIGHT), specs=[spec], folder=path, task="image_classes")


def opened(source: SourceModel, data: Path, **rest: Any) -> RowSamples:
    samples = open_samples(source, request_of(data, **rest))
    assert isinstance(samples, RowSamples)
    return samples


def paths_of(samples: RowSamples, part: Any) -> set[str]:
    rows: Any = samples.rows
    held = [rows.pictures[role][i].path for role, i in samples.parts[part]]
    return {f"{path.parent.name}/{path.name}" for path in held}


def test_classes_are_folders_and_accuracy_is_read(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", 30)
    samples = opened(model_of(tmp_path / "model"), data)
    assert samples.metric == "accuracy"
    assert samples.unit == "images"
    assert "images: 3 classes" in samples.description
    assert "classes: id2label" in samples.notes
    swapped = WEIGHT[:, [1, 0, 2]]
    before, after = samples.compare(mean_colour_onnx(WEIGHT), mean_colour_onnx(swapped), "test")
    assert before.value == 100
    blue = np.mean([name.startswith("blue") for name in paths_of(samples, "test")])
    assert after.value == pytest.approx(100 * blue)
    parts = [paths_of(samples, part) for part in ("calibration", "search", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 90


def test_images_are_fed_as_the_preprocessing_says(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(60):
        pixels = np.repeat(np.repeat(picture(i % 3, i), 2, 0), 2, 1)  # nearest halves it exactly
        Image.fromarray(pixels).save(data / f"{i}.png")
    samples = opened(model_of(tmp_path / "model"), data)
    assert samples.metric == "agreement"
    assert "no labels" in samples.description
    fed = torch.cat(
        [batch["pixel_values"] for batch in samples.draw("test", limit=99, seed=0).batches]
    )
    expected = [
        ((picture(int(name) % 3, int(name)) / 255 - MEAN) / STD).transpose(2, 0, 1)
        for name in (path.split("/")[1].removesuffix(".png") for path in paths_of(samples, "test"))
    ]
    assert len(fed) == len(expected)
    for row in fed.numpy():
        assert min(float(np.abs(row - e).max()) for e in expected) < 1e-5


def test_images_are_cropped_to_one_size_and_made_rgb(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    for i, mode in enumerate(["RGB", "L", "RGBA", "P"] * 15):
        size = (10 + i % 5, 14 + i % 3)
        made = Image.fromarray(picture(0, i, 20)).resize(size).convert(mode)
        made.save(data / "a" / f"{i}.png")
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 9},
        "crop_size": {"height": 6, "width": 6},
    }
    samples = opened(model_of(tmp_path / "model", config, size=6), data, label_column="none")
    batch = samples.draw("calibration", limit=20, seed=0).batches[0]
    assert batch["pixel_values"].shape[1:] == (3, 6, 6)
    uncropped = {**config, "do_center_crop": False}
    with pytest.raises(UsageError, match="must bring all images to one size"):
        opened(model_of(tmp_path / "model", uncropped, size=6), data, label_column="none")


def test_part_folders_keep_their_roles_and_test_images_leave_train(tmp_path: Path) -> None:
    data = tmp_path / "data"
    class_folders(data / "train", 20, seed=1, suffix=".jpg")
    class_folders(data / "val", 6, seed=2)
    class_folders(data / "test", 8, seed=3)
    leaked = (data / "test" / "red" / "0.png").read_bytes()
    (data / "train" / "red" / "leak.png").write_bytes(leaked)
    samples = opened(model_of(tmp_path / "model"), data)
    assert samples.sizes["test"] == 24
    assert samples.sizes["dev"] == 18
    assert samples.sizes["calibration"] + samples.sizes["search"] == 60
    assert "1 rows that also occur in test dropped" in samples.description
    assert "(from test)" in samples.description
    assert describe_data(request_of(data)) == samples.description


def test_of_a_large_train_folder_only_some_images_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    class_folders(data / "train", 30, seed=1)
    class_folders(data / "test", 8, seed=3)
    whole = opened(model_of(tmp_path / "model"), data)
    monkeypatch.setattr(images, "POOL", 50)
    some = opened(model_of(tmp_path / "model"), data)
    learnt = paths_of(some, "calibration") | paths_of(some, "search") | paths_of(some, "dev")
    assert len(learnt) == 50
    assert {path.split("/")[0] for path in learnt} == set(NAMES)
    assert paths_of(some, "test") == paths_of(whole, "test")
    assert "50 of 90 images of train used" in some.description


def test_the_preprocessing_is_part_of_the_hash(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", 20)
    first = opened(model_of(tmp_path / "model"), data).sha256
    assert opened(model_of(tmp_path / "model"), data).sha256 == first
    other = {**RESIZED, "image_mean": [0.5, 0.5, 0.5]}
    assert opened(model_of(tmp_path / "model", other), data).sha256 != first


def test_classes_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", 20)
    (data / "red").rename(data / "purple")
    with pytest.raises(UsageError, match="does not know: purple"):
        opened(model_of(tmp_path / "model"), data)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("0.png", lambda b: b"", "is not a PNG or JPEG image"),
        ("0.png", lambda b: b"<html>not found</html>", "is not a PNG or JPEG image"),
        ("0.png", lambda b: b[: len(b) // 2], "damaged"),
        ("0.jpg", lambda b: b[: len(b) // 2], "damaged"),
        ("0.jpg", lambda b: b"GIF89a" + b, "is not a PNG or JPEG image"),
    ],
)
def test_a_file_that_is_no_image_is_named(
    tmp_path: Path, name: str, spoil: Any, message: str
) -> None:
    data = class_folders(tmp_path / "data", 20, suffix=Path(name).suffix)
    path = data / "green" / name
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UsageError, match=rf"green/{name}.*{message}"):
        opened(model_of(tmp_path / "model"), data)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    source = model_of(tmp_path / "model")
    with pytest.raises(UsageError, match="has no data file"):
        opened(source, data)
    class_folders(data, 5)
    with pytest.raises(UsageError, match="15 different usable rows; at least 32"):
        opened(source, data)
    class_folders(data / "train", 20)
    (data / "test").mkdir()
    with pytest.raises(UsageError, match="test has no images"):
        opened(source, data)
    (data / "test").rmdir()
    class_folders(data / "val", 2)
    class_folders(data / "dev", 2)
    with pytest.raises(UsageError, match="two folders for dev"):
        opened(source, data)
    with pytest.raises(UsageError, match="not images"):
        opened(source, data, text_columns=("text",))


def test_models_that_cannot_be_fed_images_are_refused(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", 20)
    folder = tmp_path / "model"
    source = model_of(folder)
    (folder / "preprocessor_config.json").write_text('{"auto_map": {"AutoImageProcessor": "x"}}')
    with pytest.raises(UsageError, match="needs code of its own"):
        opened(source, data)
    (folder / "preprocessor_config.json").write_text('{"size"')
    with pytest.raises(UsageError, match="cannot be read"):
        opened(source, data)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Nothing"}')
    with pytest.raises(UsageError, match="cannot be loaded"):
        opened(source, data)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"has no preprocessor_config.json.*\.npz"):
        opened(source, data)
    words = source_of(MeanColour(WEIGHT), specs=[InputSpec("x", "float32", ("batch", 3, 8, 8))])
    with pytest.raises(UsageError, match="takes x, not images"):
        opened(words, data)
    small = InputSpec("pixel_values", "float32", ("batch", 3, 4, 4))
    with pytest.raises(UsageError, match="compiled for pixel_values:batchx3x4x4"):
        opened(source_of(MeanColour(WEIGHT), specs=[small], folder=model_of(folder).folder), data)


def test_a_picture_beside_a_table_is_no_image_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(f"some words {i},{i % 2}" for i in range(60)))
    Image.fromarray(picture(0, 0)).save(tmp_path / "logo.png")
    assert "text: column 1" in describe_data(request_of(tmp_path))
