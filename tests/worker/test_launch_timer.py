# SPDX-License-Identifier: Apache-2.0
"""When the loop plans: the real loop and Router with a device, a host and clients that only tell the time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightllm_backend.messages.engine_messages import Submit
from lightllm_backend.request import Request, SamplingParams
from lightllm_backend.router.batch import Batch, RouterOutput, StepResult
from lightllm_backend.router.router import Router
from lightllm_backend.worker import launch_timer
from lightllm_backend.worker.batch_channel import BatchSender
from lightllm_backend.worker.launch_timer import LaunchTimer
from lightllm_backend.worker.loop import run
from lightllm_backend.worker.statistics_log import StatisticsLog

STEP, PROMPT_TOKEN = 4e-3, 0.02e-3  # of the device
PLANNING, PLANNING_PROMPT = 0.4e-3, 0.2e-3  # of the host
LATE = 0.1e-3  # at most, how late the host wakes up


@dataclass(frozen=True)
class Arrival:
    at: float
    prompt: int = 160
    output: int = 300


class Simulation:
    """EngineServer, runner and clock for `run`, all in simulated time."""

    overlap = 1

    def __init__(self, arrivals: list[Arrival], step_seconds: Callable[[float, Batch], float], rows: int) -> None:
        self.now = 0.0
        self.waits: list[float] = []  # of each request, from its arrival until the device begins with its prompt
        self.idle: list[float] = []  # of the device before each step, where there was something to do
        self.receives = 0
        self._rng = random.Random(0)
        self._arrivals = deque(enumerate(arrivals))
        self._at = [arrival.at for arrival in arrivals]
        self._step_seconds = step_seconds
        self._left = len(arrivals)
        self._device_free = 0.0
        self._steps_in_flight = 0
        router = Router(10**6, rows, 8192, 10**6, frozenset(), clock=lambda: self.now)
        vitals = SimpleNamespace(turn=lambda busy: None, took=lambda: None)
        load = SimpleNamespace(publish=lambda queued, limit, longest: None, took=lambda ticket: None)
        structured = SimpleNamespace(take_ready=lambda router: [])
        run(
            self, router, BatchSender("", 0), self, StatisticsLog(0), vitals, load, structured, lambda: self.now  # type: ignore[arg-type]
        )  # fmt: skip

    # As an EngineServer

    @property
    def open(self) -> bool:
        return self._left > 0

    def receive(self, timeout: float) -> Iterator[Submit]:
        self.receives += 1
        next_arrival = self._arrivals[0][1].at if self._arrivals else np.inf
        if next_arrival > self.now:
            self.now = min(self.now + timeout, next_arrival)
            if timeout > 0:
                self.now += self._rng.uniform(0, LATE)
        while self._arrivals and self._arrivals[0][1].at <= self.now:
            number, arrival = self._arrivals.popleft()
            sampling = SamplingParams(max_tokens=arrival.output, ignore_eos=True, seed=number)
            yield Submit(Request(str(number), (number,) * arrival.prompt, sampling), number)

    def send(self, output: RouterOutput) -> None:
        self._left -= sum(chunk.finish_reason is not None for chunk in output.chunks)

    def publish(self, stats: object) -> None: ...

    # As a runner

    def launch(self, batch: Batch) -> Any:
        self.now += PLANNING * self._rng.uniform(0.8, 1) + PLANNING_PROMPT * len(batch.admitted)
        begin = max(self.now, self._device_free)
        if self._steps_in_flight:
            self.idle.append(begin - self._device_free)
        self.waits += [begin - self._at[admission.sampling.seed] for admission in batch.admitted]
        end = self._device_free = begin + self._step_seconds(begin, batch)
        self._steps_in_flight += 1
        return SimpleNamespace(result=lambda: self._result(end, batch), is_done=lambda: end <= self.now, masks=None)

    def _result(self, end: float, batch: Batch) -> StepResult:
        if end > self.now:
            self.now = end + self._rng.uniform(0, LATE)
        self._steps_in_flight -= 1
        return StepResult(np.full(int(batch.samples.sum()), 5, np.int32))


def as_usual(_begin: float, batch: Batch) -> float:
    prompt = int(batch.lengths[batch.num_decodes :].sum())
    return STEP + 0.01e-3 * batch.num_decodes + PROMPT_TOKEN * prompt


def poisson(rate: float, count: int, prompt: int = 160) -> list[Arrival]:
    rng, now, arrivals = random.Random(1), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        arrivals.append(Arrival(now, prompt))
    return arrivals


def simulate(
    monkeypatch: pytest.MonkeyPatch, arrivals: list[Arrival],
    step_seconds: Callable[[float, Batch], float] = as_usual, rows: int = 1000,
) -> tuple[Simulation, Simulation]:  # fmt: skip
    """With a loop that plans at once, and as it is."""
    with monkeypatch.context() as patch:
        patch.setattr(launch_timer, "MARGIN_SECONDS", 10.0)
        at_once = Simulation(arrivals, step_seconds, rows)
    return at_once, Simulation(arrivals, step_seconds, rows)


def test_new_requests_wait_for_a_step_less_and_the_device_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, late = simulate(monkeypatch, poisson(4, 100))
    assert np.median(at_once.waits) > 1.4 * STEP
    assert np.median(late.waits) < 0.75 * STEP
    assert np.percentile(late.waits, 99) < np.percentile(at_once.waits, 99)
    assert max(late.idle) < 0.5e-3
    assert sum(late.idle) < 1e-3 * late.now
    assert late.now < at_once.now + 0.02
    assert late.receives < 10 * len(late.idle), "the loop does not spin"


@pytest.mark.parametrize("prompt", [1000, 4000])
def test_the_device_does_not_wait_behind_runs_of_long_prompts(monkeypatch: pytest.MonkeyPatch, prompt: int) -> None:
    _, late = simulate(monkeypatch, poisson(4, 20) + [Arrival(5.0, prompt, 2)] * 20 + [Arrival(6.0)] * 5)
    assert max(late.idle) < 2e-3  # to plan eight of them at once takes longer than foreseen
    assert sum(late.idle) < 2e-3 * late.now


def test_with_a_queue_it_plans_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, late = simulate(monkeypatch, [Arrival(0.0)] * 64, rows=8)
    assert late.now <= at_once.now + 0.02
    assert sum(late.idle) < 1e-3 * late.now


def test_a_step_that_ends_sooner_than_foreseen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, late = simulate(monkeypatch, [Arrival(0.0)] * 6, lambda begin, _batch: 20e-3 if begin < 1.0 else 4e-3)
    assert 0.2e-3 < sum(late.idle) < 1.2e-3


def test_steps_that_take_long_for_once_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    _, late = simulate(
        monkeypatch, poisson(4, 100), lambda begin, batch: as_usual(begin, batch) * (5 if rng.random() < 0.02 else 1)
    )
    assert np.median(late.waits) < STEP
    assert max(late.idle) < 1.2e-3
    assert sum(late.idle) < 1e-3 * late.now


# The facts one by one


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def batch_of(decodes: int, prompts: int = 0) -> Any:
    return SimpleNamespace(num_decodes=decodes, rows=[0] * (decodes + prompts))


def run_steps(timer: LaunchTimer, clock: Clock, *seconds: float, decodes: int = 4, prompts: int = 0) -> None:
    """Steps that are alike and overlap: the next is launched as one begins, and the last is still in flight."""
    if not timer._in_flight:
        timer.planning()
        timer.launched(batch_of(decodes, prompts), all_admitted=True)
    for duration in seconds:
        timer.planning()
        clock.now += 0.001
        timer.launched(batch_of(decodes, prompts), all_admitted=True)
        clock.now += duration - 0.001
        timer.finished()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_it_waits_until_the_plan_must_begin(clock: Clock) -> None:
    timer = LaunchTimer(clock)
    assert timer.spare_seconds() == 0.0
    run_steps(timer, clock, 0.010, 0.010, 0.012)
    # The shortest step, 10 ms, less 1 ms of planning and the margin.
    assert timer.spare_seconds() == pytest.approx(0.009 - launch_timer.MARGIN_SECONDS)
    clock.now += 0.004
    assert timer.spare_seconds() == pytest.approx(0.005 - launch_timer.MARGIN_SECONDS)
    clock.now += 0.1
    assert timer.spare_seconds() == 0.0


def test_only_decodes_of_no_more_sequences_tell_anything(clock: Clock) -> None:
    timer = LaunchTimer(clock)
    run_steps(timer, clock, 0.2, 0.2, 0.2, decodes=4, prompts=1)
    assert timer.spare_seconds() == 0.0
    run_steps(timer, clock, 0.2, 0.01, 0.01, decodes=4)
    known = timer.spare_seconds()
    assert known > 0.008
    timer._in_flight[0] = batch_of(4, prompts=9)
    assert timer.spare_seconds() == known
    timer._in_flight[0] = batch_of(5)
    assert timer.spare_seconds() == known
    timer._in_flight[0] = batch_of(3)
    assert timer.spare_seconds() == 0.0


def test_a_launch_that_was_too_late_makes_it_forget(clock: Clock) -> None:
    timer = LaunchTimer(clock)
    run_steps(timer, clock, 0.01, 0.01, 0.01)
    timer.planning()
    timer.launched(batch_of(4), all_admitted=True)
    timer.finished()
    assert timer.spare_seconds() == 0.0


def test_one_step_is_no_measure(clock: Clock) -> None:
    timer = LaunchTimer(clock)
    run_steps(timer, clock, 0.01)
    assert timer.spare_seconds() == 0.0
    run_steps(timer, clock, 0.01)
    assert timer.spare_seconds() > 0.008


def test_it_does_not_wait_where_others_wait_for_admission(clock: Clock) -> None:
    timer = LaunchTimer(clock)
    run_steps(timer, clock, 0.01, 0.01, 0.01)
    timer._may_wait = False
    assert timer.spare_seconds() == 0.0
