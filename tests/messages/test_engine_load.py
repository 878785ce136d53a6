# SPDX-License-Identifier: Apache-2.0
"""The door: closed while the queue is full, with what is on its way there, and never for longer than that."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightllm_backend.messages.engine_load import PASS_SECONDS, Door, EngineLoad
from lightllm_backend.request import RequestError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def worker(tmp_path: Path) -> EngineLoad:
    return EngineLoad(tmp_path)


@pytest.fixture
def door(tmp_path: Path, clock: Clock, worker: EngineLoad) -> Door:
    """A door through which one request has just passed although it was closed."""
    door = Door(EngineLoad(tmp_path), clock)
    worker.publish(1, 1)
    assert not is_closed(door)
    worker.publish(0, 0)
    return door


def is_closed(door: Door, may_pass: bool = False, tenant: str = "") -> bool:
    try:
        door.check(tenant, lambda: may_pass)
    except RequestError:
        return True
    return False


def test_it_is_closed_while_the_queue_is_full(door: Door, worker: EngineLoad) -> None:
    assert not is_closed(door), "nothing is known yet"
    for queued, closed in ((0, False), (7, False), (8, True), (9, True), (7, False)):
        worker.publish(queued, 8)
        assert is_closed(door) == closed
    worker.publish(8, 8)
    with pytest.raises(RequestError, match=r"^UNAVAILABLE: the queue is full \(8 requests\)$"):
        door.check("", lambda: False)
    assert not is_closed(door, may_pass=True), "a probe passes"
    worker.publish(0, 0)
    assert not is_closed(door), "a worker that ends opens it"


def test_tenants_with_shorter_queues_pass(door: Door, worker: EngineLoad) -> None:
    worker.publish(8, 8, "ähnlich")
    assert is_closed(door, tenant="ähnlich")
    assert not is_closed(door, tenant="b")
    assert not is_closed(door)


def test_what_is_on_its_way_counts(door: Door, worker: EngineLoad, tmp_path: Path) -> None:
    generation = EngineLoad(tmp_path)
    worker.publish(5, 8)
    _, second, third = (door.ticket() for _ in range(3))
    assert is_closed(door)
    worker.took(second)  # and so the first, which was lost
    assert is_closed(door), "it is in no number yet"
    worker.publish(7, 8)
    assert is_closed(door)
    generation.refused(third)
    assert not is_closed(door)
    worker.took(0)
    worker.publish(7, 8)
    assert not is_closed(door), "requests without a ticket change nothing"


def test_a_worker_that_follows_another_goes_on_from_its_tickets(door: Door, worker: EngineLoad, tmp_path: Path) -> None:
    worker.took(door.ticket())
    worker.publish(8, 8)
    EngineLoad(tmp_path).publish(7, 8)
    assert not is_closed(door)


def test_wrong_numbers_keep_it_closed_for_a_moment_only(door: Door, worker: EngineLoad, clock: Clock) -> None:
    worker.publish(8, 8)
    passed = []
    for _ in range(100):
        clock.now += PASS_SECONDS / 10
        passed.append(not is_closed(door))
    assert 9 <= sum(passed) <= 10


def test_a_tokenizer_step_that_is_loaded_again_goes_on_counting(door: Door, worker: EngineLoad, tmp_path: Path) -> None:
    worker.took(50)
    worker.publish(7, 8)
    again = Door(EngineLoad(tmp_path), lambda: 0.0)
    assert not is_closed(again)
    assert again.ticket() == 51
    assert door.ticket() == 1
    assert not is_closed(door), "one that is behind counts nobody"
