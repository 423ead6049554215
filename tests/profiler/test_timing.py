"""Alternation, warm-up and refusal of impossible times, on runners with a scripted clock."""

from __future__ import annotations

import gc
import math
from itertools import chain, repeat

import pytest

from zipc.core.errors import NoisyMeasurement
from zipc.profiler.timing import interleave, warm_up


class Scripted:
    """Returns given times and writes its name into a shared log."""

    def __init__(self, name: str, log: list[str], times=None) -> None:
        self.name, self.log, self.times = name, log, iter(times or repeat(1.0))

    def run(self) -> float:
        self.log.append(self.name)
        return next(self.times)


def test_each_timed_run_follows_an_untimed_run_of_the_same_runner_and_rounds_alternate():
    log: list[str] = []
    runners = [Scripted("a", log), Scripted("b", log), Scripted("c", log)]
    interleave(runners, rounds=2)
    assert "".join(log) == "aabbcc" + "ccbbaa"


def test_only_the_last_of_each_group_is_kept_and_in_round_order():
    log: list[str] = []
    a = Scripted("a", log, [9.0, 9.0, 1.0, 9.0, 9.0, 2.0])
    b = Scripted("b", log, [8.0, 8.0, 3.0, 8.0, 8.0, 4.0])
    assert interleave([a, b], rounds=2, untimed=2) == [[1.0, 2.0], [3.0, 4.0]]


def test_no_untimed_runs_when_none_are_asked_for():
    log: list[str] = []
    interleave([Scripted("a", log), Scripted("b", log)], rounds=3, untimed=0)
    assert "".join(log) == "abbaab"


def test_a_linear_drift_of_the_machine_cancels_over_two_rounds():
    clock = iter(range(1000))

    class Drifting:
        def run(self) -> float:
            return 100.0 + next(clock)

    first, second = interleave([Drifting(), Drifting()], rounds=10)
    assert sum(first) == sum(second)


def test_the_pause_before_a_series_favours_nobody():
    class Resting:
        """Asked for four rounds at once; what runs first after the pause is slower."""

        at_once = 4

        def series(self, runners, *, rounds, untimed):
            times = [[1.0] * rounds for _ in runners]
            times[0][0] = 2.0
            return times

        def run(self) -> float:
            raise AssertionError("asked for a single run")

    first, second = interleave([Resting(), Resting()], rounds=16)
    assert first == [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0] * 2
    assert second == [1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0] * 2


def test_callback_is_called_once_per_round():
    calls: list[int] = []
    interleave([Scripted("a", [])], rounds=5, on_round=lambda: calls.append(1))
    assert len(calls) == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_a_time_that_is_no_time_is_refused(bad: float):
    with pytest.raises(NoisyMeasurement, match="no time"):
        interleave([Scripted("a", [], [1.0, bad])], rounds=1)
    with pytest.raises(NoisyMeasurement):
        warm_up(Scripted("a", [], [bad]))


def test_warm_up_stops_after_three_runs_within_five_percent():
    times = [9.0, 5.0, 3.0, 2.0, 2.09, 2.0, 7.0]
    assert warm_up(Scripted("a", [], times)) == times[:6]


def test_warm_up_gives_up_at_the_limit_when_it_never_settles():
    times = chain.from_iterable(repeat((1.0, 2.0)))
    assert len(warm_up(Scripted("a", [], times), max_runs=7)) == 7


def test_garbage_collection_is_off_while_timing_and_restored_after_an_error():
    seen: list[bool] = []

    class Watching:
        def run(self) -> float:
            seen.append(gc.isenabled())
            return 1.0 if len(seen) < 4 else math.nan

    with pytest.raises(NoisyMeasurement):
        interleave([Watching()], rounds=10)
    assert seen == [False] * 4
    assert gc.isenabled()
