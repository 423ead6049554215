"""What an engine is built to be: read from text, refused where it cannot be meant."""

from __future__ import annotations

import pytest

from zipc.core.engine_options import BY_DEFAULT, EngineOptions
from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.targets import requested_target


def test_options_are_read_and_told_to_trtexec() -> None:
    asked = EngineOptions.parse("refit, version-compatible,level=4")
    assert asked == EngineOptions(refit=True, version_compatible=True, level=4)
    assert asked.flags == ["--refit", "--versionCompatible", "--builderOptimizationLevel=4"]
    assert EngineOptions.parse("level=0").flags == ["--builderOptimizationLevel=0"]
    assert EngineOptions.parse("") == BY_DEFAULT
    assert BY_DEFAULT.flags == []


@pytest.mark.parametrize(
    "text",
    [
        "fast",
        "level",
        "level=6",
        "level=-1",
        "level=x",
        "refit=1",
        "refit,refit",
        "level=²",
        ",",
        "refit,",
    ],
)
def test_what_is_no_option_is_named(text: str) -> None:
    with pytest.raises(UsageError, match=r"--engine-options.*version-compatible.*level=5"):
        EngineOptions.parse(text)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target": "cpu"}, "for targets under TensorRT"),
        ({"target": "a100", "host": "board"}, "without. Leave out one of"),
        ({"target": "a100", "engine_options": "nothing"}, "'nothing' is not one"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(asked: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        requested_target(Request(**{"model": "m", "engine_options": "refit", **asked}))  # type: ignore[arg-type]
    requested_target(Request(model="m", target="a100", engine_options="refit,level=2"))
