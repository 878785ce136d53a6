# SPDX-License-Identifier: Apache-2.0
"""How long the planning of a step may wait."""

import pytest

from lightllm_backend.engine.pace import Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run_steps(pace: Pace, clock: Clock, seconds: list[float], planning: float = 0.001) -> None:
    """Steps that overlap: the next is launched as one begins, and the last is still in flight."""
    pace.planning()
    clock.now += planning
    pace.launched()
    for duration in seconds:
        pace.planning()
        clock.now += planning
        pace.launched()
        clock.now += duration - planning
        pace.finished(more_in_flight=True)


def test_nothing_is_known_at_first(clock) -> None:
    pace = Pace(clock)
    assert pace.spare_seconds() == 0.0
    run_steps(pace, clock, [0.01])
    assert pace.spare_seconds() == 0.0


def test_planning_waits_until_it_must_begin(clock) -> None:
    pace = Pace(clock)
    run_steps(pace, clock, [0.01, 0.01, 0.01])
    # 10 ms of the step, less 1 ms of planning and half a one to be safe, in whole ms.
    assert pace.spare_seconds() == pytest.approx(0.008)
    clock.now += 0.004
    assert pace.spare_seconds() == pytest.approx(0.004)
    clock.now += 0.1
    assert pace.spare_seconds() == 0.0


def test_the_shortest_step_counts(clock) -> None:
    pace = Pace(clock)
    run_steps(pace, clock, [0.010, 0.200, 0.010, 0.200])
    assert pace.spare_seconds() == pytest.approx(0.008)
    run_steps(pace, clock, [0.200] * 4)
    assert pace.spare_seconds() == pytest.approx(0.198)


def test_an_idle_device_is_not_kept_waiting(clock) -> None:
    pace = Pace(clock)
    run_steps(pace, clock, [0.01, 0.01])
    clock.now += 0.01
    pace.finished(more_in_flight=False)
    assert pace.spare_seconds() == 0.0
    clock.now += 5.0
    pace.planning()
    pace.launched()
    assert pace.spare_seconds() == pytest.approx(0.008)
