"""--max-drop: as fast as can be within a loss that is read on dev."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zipc.pipeline as pipeline
from tests.command_line import Run
from tests.tiny_project import Told, request
from zipc.closed_loop import ACCEPT, ClosedLoop, _Attempt
from zipc.core.errors import TargetUnreachable, UsageError
from zipc.core.request import Request
from zipc.core.types import Allocation
from zipc.effort import EFFORTS
from zipc.metrics import EvalResult
from zipc.pipeline import compile_model
from zipc.samples.text import TextSamples
from zipc.targets import requested_target

pytestmark = pytest.mark.usefixtures("exact_times")


@pytest.fixture
def asked(sources: tuple[Path, Path], tmp_path: Path) -> Request:
    model, data = sources
    return request(model, data, tmp_path / "out", model.with_name("cache"), speedup=None)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Parts that quality is read from, and what is lost there: a point for a tenth of the bytes."""
    seen: list[tuple[str, float]] = []

    def compare(
        self: Any, dense: bytes, compiled: bytes, part: str, **_: Any
    ) -> tuple[EvalResult, EvalResult]:
        lost = 10 * (1 - len(compiled) / len(dense))
        seen.append((part, lost))
        rows = np.tile([[0.0, 0.0], [1.0, 1.0]], (20, 1))
        return EvalResult(90.0, rows, 40), EvalResult(90.0 - lost, rows, 40)

    monkeypatch.setattr(TextSamples, "compare", compare)
    return seen


def test_more_allowed_is_faster_and_no_loss_is_larger(
    asked: Request, read: list[tuple[str, float]], tmp_path: Path
) -> None:
    speedups = []
    for i, allowed in enumerate((2.0, 4.0)):
        read.clear()
        out = tmp_path / str(i)
        told = Told()
        manifest = compile_model(replace(asked, max_drop=allowed, output=out), progress=told)
        parts = [part for part, _ in read]
        assert parts == ["dev"] * (len(parts) - 1) + ["test"]  # nothing before the report reads it
        assert read[-1][1] <= allowed
        assert max(lost for _, lost in read) > allowed  # it was tried, too
        assert manifest.verdict == "validated"
        (note,) = (n for n in manifest.latency.notes if n.startswith("--max-drop"))
        assert f"of {allowed:g} allowed" in note
        speedups.append(manifest.latency.speedup or 0.0)
    assert 1.05 < speedups[0] < speedups[1]


def test_what_no_artifact_keeps_is_unreachable_and_leaves_nothing(
    asked: Request, read: list[tuple[str, float]], tmp_path: Path
) -> None:
    with pytest.raises(TargetUnreachable, match=r"loses as little as 0 of .* Allow more"):
        compile_model(replace(asked, max_drop=0.0), progress=Told())
    assert not (tmp_path / "out").exists()
    assert {part for part, _ in read} == {"dev"}


def test_without_rows_of_dev_a_speedup_is_asked_for(
    asked: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = pipeline.set_up

    def without(*given: Any) -> Any:
        setup = really(*given)
        sizes = {**setup.samples.sizes, "dev": 0}
        monkeypatch.setattr(TextSamples, "sizes", property(lambda _: sizes))
        return setup

    monkeypatch.setattr(pipeline, "set_up", without)
    with pytest.raises(UsageError, match="0 rows with labels"):
        compile_model(replace(asked, max_drop=1.0), progress=Told())


@pytest.mark.parametrize(("max_drop", "taken"), [(None, 7.3), (0.5, 2.65)])
def test_a_build_near_the_speedup_is_taken_before_a_far_faster_one(
    max_drop: float | None, taken: float
) -> None:
    """What a speedup costs is not to be read from a build of another one."""
    loop = ClosedLoop.__new__(ClosedLoop)
    loop.effort, loop.accept = replace(EFFORTS["quick"], rounds=0), ACCEPT
    loop.request = Request(model="m", max_drop=max_drop)
    loop.looks, loop.searched = [], 0
    loop.attempts = [
        _Attempt(Allocation({}, 1.0, 0.0), speedup, 0.01, 1 / speedup, loss)
        for speedup, loss in ((7.3, 0.1), (2.65, 0.002), (1.6, 0.0))
    ]
    assert loop.run(2.71).measured == taken


@pytest.mark.parametrize("drop", [-0.5, float("nan"), float("inf")])
def test_a_loss_that_cannot_be_allowed_is_refused(drop: float) -> None:
    with pytest.raises(UsageError, match="points of the metric"):
        requested_target(Request(model="m", max_drop=drop))


def test_it_is_a_goal_of_its_own(run: Run) -> None:
    given = ["compile", "minilm", "--data", "d", "-o", "out", "--max-drop", "0.5"]
    code, _, err = run(*given, "--speedup", "2x")
    assert code == 2
    assert "--speedup and --max-drop are goals of their own" in err
