"""`--quantizer modelopt`: Model Optimizer's ranges and rounding in our graph, or a refusal."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.tiny_project import Told, fake_clock, model_folder, pairs_file, request, small_effort
from tests.zipc.test_integer_body import NETS
from zipc.core.errors import UsageError
from zipc.core.files import read_json
from zipc.core.request import Request
from zipc.core.types import Allocation, Level, Silent
from zipc.model_source import load_source, settle
from zipc.numerics.int8 import FULL, REDUCED, STATIC
from zipc.pipeline import compile_model, plan_model
from zipc.prepare import Prepared, prepare
from zipc.pruner.levels import Levels
from zipc.quantizer import by_modelopt, check_modelopt, in_floats, quantised, unpadded
from zipc.samples import Feeds, open_samples
from zipc.stage_cache import StageCache
from zipc.targets import load_target

installed = pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed"
)


def test_one_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt", None)
    with pytest.raises(UsageError, match=r"pip install 'zipc\[modelopt\]'"):
        check_modelopt(FULL)


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ({"quantizer": "other"}, "Choose from: zipc, modelopt"),
        ({"quantizer": "modelopt", "numerics": "fp32"}, "has nothing to calibrate"),
        ({"quantizer": "modelopt", "numerics": "int8-dynamic"}, "has nothing to calibrate"),
    ],
)
def test_what_cannot_be_meant_is_refused(rest: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Request(model="minilm", **rest).check(load_target("cpu"))


def test_weights_that_would_overflow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipc.quantizer._modelopt", lambda: None)
    with pytest.raises(UsageError, match="no VNNI"):
        check_modelopt(REDUCED)


def factory_request(folder: Path, source: str, rows: tuple[int, ...], **rest: Any) -> Request:
    """For `net` of a file with this source, and random rows."""
    (folder / "nets.py").write_text(source)
    values = np.random.default_rng(0).standard_normal(rows, dtype=np.float32)
    np.savez(folder / "data.npz", x=values)
    model, data = Path(f"{folder / 'nets.py'}:net"), folder / "data.npz"
    return request(model, data, None, folder, sequence_length=None, **rest)


def test_networks_of_convolutions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zipc.groundwork.check_modelopt", lambda _: None)
    asked = factory_request(tmp_path, NETS, (40, 3, 16, 16), quantizer="modelopt")
    with pytest.raises(UsageError, match="is for linear maps"):
        plan_model(asked, progress=Told())


WITH_A_HEAD = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 512)

    def forward(self, x):
        return self.head(x + self.down(self.up(x).relu()))


def net():
    return Net()
"""


@pytest.mark.parametrize(("quantizer", "numeric"), [("zipc", STATIC), ("modelopt", "fp32")])
def test_maps_that_nothing_is_cut_from_stay_in_floats_for_another(
    quantizer: str, numeric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_clock(monkeypatch)
    small_effort(monkeypatch)
    monkeypatch.setattr("zipc.groundwork.check_modelopt", lambda _: None)
    how: dict[str, Any] = {"prune": False, "speedup": None, "numerics": STATIC}
    asked = factory_request(tmp_path, WITH_A_HEAD, (160, 64), quantizer=quantizer, **how)
    plan = plan_model(asked, progress=Told())
    chosen = {name: level.numeric for name, level in plan.allocation.levels.items()}
    assert chosen["head"] == numeric
    assert {n for name, n in chosen.items() if name != "head"} == {STATIC}


def test_int8_of_nothing_that_it_takes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zipc.groundwork.check_modelopt", lambda _: None)
    fake_clock(monkeypatch)
    alone = WITH_A_HEAD.replace("x + self.down(self.up(x).relu())", "x")
    how: dict[str, Any] = {"prune": False, "speedup": None, "numerics": STATIC}
    asked = factory_request(tmp_path, alone, (160, 64), quantizer="modelopt", **how)
    with pytest.raises(UsageError, match=r"no site of .* has such"):
        plan_model(asked, progress=Told())


def test_rows_are_fed_without_their_padding() -> None:
    batch = {"x": torch.arange(6).view(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1] * 3])}
    assert [row["x"].tolist() for row in unpadded([batch])] == [[[0, 1]], [[3, 4, 5]]]
    assert [row["x"].tolist() for row in unpadded([{"x": batch["x"]}])] == [
        [[0, 1, 2]],
        [[3, 4, 5]],
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantizer")
    model_folder(folder / "model")
    pairs_file(folder / "pairs.csv")
    return folder


@pytest.fixture(scope="module")
def prepared(project: Path) -> tuple[Prepared, list[Feeds]]:
    asked = request(project / "model", project / "pairs.csv", None, project / "cache")
    source = load_source(asked.model)
    asked = settle(asked, source)
    made = prepare(source, asked, cache=StageCache(project / "cache"), progress=Silent())
    return made, open_samples(source, asked).draw("calibration", limit=24, seed=0).batches


@installed
def test_a_map_computes_what_model_optimizer_simulates(
    prepared: tuple[Prepared, list[Feeds]],
) -> None:
    made, rows = prepared
    at = Allocation({n: Level(s.units, STATIC) for n, s in made.sites.items()}, 0.0, 0.0)
    levels = Levels(made.sites, made.calls, made.weights, {}, {})
    states = by_modelopt(made, at, levels.states(in_floats(at)), rows)
    theirs = quantised(load_source(str(made.source.folder)).module, rows)
    for path, state in states.maps.items():
        module = theirs.get_submodule(path)
        x = torch.randn(64, state.weight.shape[1])
        found = F.linear(state.seen(x.clone()), state.weight, state.bias)
        torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-4)


@installed
def test_a_compile_ships_its_rounding(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_clock(monkeypatch)
    small_effort(monkeypatch)
    asked = request(
        project / "model",
        project / "pairs.csv",
        project / "out",
        project / "cache",
        numerics="int8",
        quantizer="modelopt",
    )
    manifest = compile_model(asked, progress=Told())
    assert {a.level.numeric for a in manifest.allocation if a.level.width} == {STATIC}
    assert read_json(project / "out" / "manifest.json")["request"]["quantizer"] == "modelopt"
