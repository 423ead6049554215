"""Two graphs timed in turns, each with the device for itself."""

from __future__ import annotations

import pytest

from zipc.turns import in_turns


class Shared:
    """A device on which a graph that takes over waits, for a while, for what the other left."""

    def __init__(self, busy_ms: float) -> None:
        self.busy_ms = busy_ms
        self.holder: Graph | None = None
        self.left_ms = 0.0


class Graph:
    """A runner: every other of its runs waits while the device is not free."""

    def __init__(self, ms: float, device: Shared) -> None:
        self.ms, self.device, self.runs = ms, device, 0

    def run(self) -> float:
        device = self.device
        if device.holder is not self:
            device.holder, device.left_ms = self, device.busy_ms
        self.runs += 1
        taken = self.ms + (4.0 if device.left_ms > 0 and self.runs % 2 else 0.0)
        device.left_ms -= taken
        return taken


@pytest.mark.parametrize("ms", [2.5, 0.5, 150.0])
def test_what_another_graph_left_running_is_not_timed(ms: float) -> None:
    device = Shared(busy_ms=100.0)
    timing = in_turns([Graph(3 * ms, device), Graph(ms, device)])
    assert timing.speedup == pytest.approx(3.0)
    assert max(timing.candidate_ms) == ms


def test_graphs_of_seconds_are_not_run_more_often_than_needed() -> None:
    device = Shared(busy_ms=0.0)
    slow, fast = Graph(2000.0, device), Graph(1000.0, device)
    timing = in_turns([slow, fast])
    assert len(timing.candidate_ms) == len(timing.reference_ms) == 8 * 8
    assert slow.runs < 8 * 13
