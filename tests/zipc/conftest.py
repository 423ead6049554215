"""What whole compiles share: little effort, times that are exact, and a model with its data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_project import fake_clock, model_folder, pairs_file, small_effort


@pytest.fixture(scope="module")
def little_effort() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small_effort(patch)
        yield


@pytest.fixture(scope="module")
def exact_times(little_effort: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        fake_clock(patch)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and pairs of sentences."""
    root = tmp_path_factory.mktemp("sources")
    return model_folder(root / "model"), pairs_file(root / "pairs.csv")
