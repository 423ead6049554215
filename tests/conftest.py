"""Fixtures of several folders, and what makes tests quick: work that is done once a process."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator

import pytest
import torch

from tests import loopback
from tests.command_line import Run, command_line
from zipc.profiler import remote


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files run whole in one process, and those that share what they trace in the same one."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session", autouse=True)
def _operators_are_read_once() -> Iterator[None]:
    """The exporter parses the source of all of onnxscript's operators anew for every graph."""
    from torch.onnx._internal.exporter._registration import onnxscript_apis as apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="module", autouse=True)
def _imports_are_not_collected() -> None:
    """A compile collects garbage after every stage: 0.3 s each, were it over all that is loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _random_numbers_are_the_same_in_every_run() -> None:
    """Whatever ran before in the process, and in whichever order."""
    torch.manual_seed(0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, run in this process."""
    return command_line(capsys)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback.Sshd]:
    sshd = loopback.start(tmp_path_factory.mktemp("sshd"))
    yield sshd
    sshd.stop()


@pytest.fixture
def through_loopback(server: loopback.Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boards are this machine, by its own sshd; a lost connection is taken up at once."""
    monkeypatch.setenv("ZIPC_SSH", server.command)
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0))
