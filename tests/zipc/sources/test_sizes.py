"""What is timed: flags and the model together give every size, or a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_folders import save_family
from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.core.shapes import parse_input_shapes
from zipc.core.types import InputSpec, Workload
from zipc.core.workload import read_workload, resized, workload_document
from zipc.model_source import SourceModel, load_source, settle


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceModel]:
    root = tmp_path_factory.mktemp("folders")
    path = root / "nets.py"
    path.write_text(
        "from torch import nn\n"
        "def net(): return nn.Linear(4, 2)\n"
        "class One(nn.Linear):\n"
        "    def forward(self, input): return super().forward(input.reshape(3, 4))\n"
        "def one(): return One(4, 2)\n"
    )
    shapes = parse_input_shapes("input:3x4")
    return {
        "text": load_source(str(save_family("bert", root / "bert"))),
        "image": load_source(str(save_family("vit", root / "vit"))),
        "factory": load_source(f"{path}:net", input_shapes=shapes),
        "one": load_source(f"{path}:one", input_shapes=shapes),
    }


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("x:1x3x224x224", (InputSpec("x", "float32", (1, 3, 224, 224)),)),
        (
            " x:2x3 , ids:2x128:int64",
            (InputSpec("x", "float32", (2, 3)), InputSpec("ids", "int64", (2, 128))),
        ),
        ("x:7", (InputSpec("x", "float32", (7,)),)),
    ],
)
def test_input_shapes_are_read(text: str, specs: tuple[InputSpec, ...]) -> None:
    assert parse_input_shapes(text) == specs
    assert parse_input_shapes(",".join(map(str, specs))) == specs


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "x:", "1x3x4", "x:1x3x", "x:1xbx3", "x:0x3", "x:-1x3", "x:1X3", "a b:1x3"),
        *("x:1,3", "x:1x3:float8", "x:1x3:complex64", "x:1x3,x:1x4", "x:1.5x3", "x:1x3,,y:1"),
    ],
)
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--input-shapes"):
        parse_input_shapes(text)


@pytest.mark.parametrize(
    ("kind", "asked", "workload"),
    [
        ("text", {}, Workload(1, 64, 1)),
        ("text", {"sequence_length": 16, "batch_size": 3}, Workload(3, 16, 1)),
        ("image", {}, Workload(1, None, 1, {"pixel_values": (1, 3, 16, 16)})),
        (
            "image",
            {"batch_size": 4, "threads": 2},
            Workload(4, None, 2, {"pixel_values": (4, 3, 16, 16)}),
        ),
        ("image", {"input_shapes": "pixel_values:5x3x16x16"}, None),
        ("factory", {"input_shapes": "input:3x4"}, Workload(3, None, 1, {"input": (3, 4)})),
        ("factory", {}, Workload(1, None, 1, {"input": (1, 4)})),
        ("one", {"input_shapes": "input:3x4"}, Workload(3, None, 1, {"input": (3, 4)})),
    ],
)
def test_sizes_left_open_are_filled_in(
    sources: dict[str, SourceModel], kind: str, asked: dict[str, Any], workload: Workload | None
) -> None:
    if "input_shapes" in asked:
        asked = asked | {"input_shapes": parse_input_shapes(asked["input_shapes"])}
    settled = settle(Request(model="m", **asked), sources[kind])
    wanted = workload or Workload(5, None, 1, {"pixel_values": (5, 3, 16, 16)})
    assert settled.workload == wanted
    assert settle(settled, sources[kind]) == settled


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("text", {"sequence_length": 65}, r"--sequence-length 65 is more than .*\(64\)"),
        ("image", {"sequence_length": 128}, r"no sequence axis: its inputs are pixel_values"),
        (
            "factory",
            {"input_shapes": "input:3x4", "batch_size": 2},
            "--input-shapes has a batch of 3",
        ),
        ("one", {"batch_size": 2}, "the model takes a batch of 3"),
    ],
)
def test_sizes_that_contradict_are_refused(
    sources: dict[str, SourceModel], kind: str, asked: dict[str, Any], message: str
) -> None:
    if "input_shapes" in asked:
        asked = asked | {"input_shapes": parse_input_shapes(asked["input_shapes"])}
    with pytest.raises(UsageError, match=message):
        settle(Request(model="m", **asked), sources[kind])


WORKLOADS = [
    Workload(),
    Workload(2, 64, 4),
    Workload(1, None, 1, {"x": (1, 3, 32, 32)}),
    Workload(1, None, 1, {"x": (1, 3, 32, 32), "t": (1,)}),
    Workload(1, None, 2, past_length=256),
]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_workload_is_read_back_as_it_was_written(workload: Workload) -> None:
    document = workload_document(workload)
    assert read_workload(document) == workload
    assert ("sequence_length" in document) == (workload.sequence_length is not None)
    assert None not in document.values()


def test_sizes_of_a_workload_are_changed_in_its_shapes_too() -> None:
    shapes = {"x": (2, 3, 8, 8), "grid": (5, 2)}
    changed = resized(Workload(2, None, 1, shapes), batch_size=4, threads=3)
    assert changed == Workload(4, None, 3, {"x": (4, 3, 8, 8), "grid": (5, 2)})
    assert resized(Workload(2, 64, 4), sequence_length=32) == Workload(2, 32, 4)
    assert all(resized(workload) == workload for workload in WORKLOADS)
    with pytest.raises(UsageError, match="nothing in this workload is a sequence"):
        resized(changed, sequence_length=32)


def test_every_workload_has_a_key_of_its_own_that_can_name_a_folder() -> None:
    many = [
        *WORKLOADS,
        Workload(1, None, 1, {"y": (1, 3, 32, 32)}),
        Workload(1, None, 1, {"x": (1, 3, 32, 64)}),
        Workload(1, None, 1, {f"input_number_{i}": (1, 3, 32, 32) for i in range(9)}),
        Workload(1, None, 1, {f"input_number_{i}": (1, 3, 32, 33) for i in range(9)}),
    ]
    keys = [workload.key for workload in many]
    assert len(set(keys)) == len(keys)
    assert all(len(key) < 120 and set("/\\: ").isdisjoint(key) for key in keys)
    assert Workload(1, 128, 1).key == "b1s128t1"


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"batch_size": 1},
        {"batch_size": "1", "threads": 1},
        {"batch_size": 0, "threads": 1},
        {"batch_size": 1, "threads": 1, "sequence_length": True},
        {"batch_size": 1, "threads": 1, "input_shapes": {"x": "1x3"}},
        {"batch_size": 1, "threads": 1, "input_shapes": [1]},
        {"batch_size": 1, "threads": 1, "length": 3},
    ],
)
def test_damaged_workload_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_workload(document)


@pytest.mark.parametrize("workload", WORKLOADS[:3])
def test_flags_ask_for_the_workload(workload: Workload, tmp_path: Path) -> None:
    flags = workload.flags.split()
    assert flags[-2:] == ["--threads", str(workload.threads)]
    if workload.input_shapes:
        (spec,) = parse_input_shapes(flags[1])
        assert spec.shape == workload.input_shapes[spec.name]
    else:
        assert flags[:4] == [
            "--batch-size",
            str(workload.batch_size),
            "--sequence-length",
            str(workload.sequence_length),
        ]
