# SPDX-License-Identifier: Apache-2.0
"""Long prompts: the shorter go first, none waits for ever, no more than fit are taken, each has one end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lightllm_backend.request import RequestError
from lightllm_backend.text.prompt_lane import SECONDS_PER_BYTE, LongPrompt, PromptLane
from tests.polling import poll

MIB = 1 << 20


class Lane:
    """A lane whose thread is busy with a first prompt until `go_on`, and what has become of the others."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ends: list[str] = []
        self.lane = PromptLane(max_prompts=4, max_bytes=3 * MIB, clock=lambda: self.now)
        self._busy, self._gate = threading.Event(), threading.Event()
        self.lane.put(LongPrompt(10, None, lambda: False, self._hold, lambda error: None))
        assert self._busy.wait(10)

    def _hold(self) -> None:
        self._busy.set()
        assert self._gate.wait(60)

    def put(self, name: str, size: int = 10, deadline: float | None = None, gone: bool = False) -> None:
        def encode() -> None:
            self.ends.append(name)
            if name == "fails":
                raise ValueError("of a tokenizer")

        def refuse(error: RequestError) -> None:
            self.ends.append(f"{name}: {error}")

        self.lane.put(LongPrompt(size, deadline, lambda: gone, encode, refuse))

    def finish(self) -> list[str]:
        """Let the thread go on, and wait until nothing is left."""
        self._gate.set()
        assert poll(lambda: not self.lane._waiting), "the thread goes on"
        self.lane.close()
        return self.ends


@pytest.fixture
def lane() -> Iterator[Lane]:
    made = Lane()
    yield made
    made._gate.set()
    made.lane.close()


def test_shorter_prompts_go_first_but_not_for_ever(lane: Lane) -> None:
    lane.put("long", MIB)
    lane.put("longer", 2 * MIB - 1000)
    lane.now = 5.0
    lane.put("short")
    lane.now = MIB * SECONDS_PER_BYTE + 1
    lane.put("too late")
    assert lane.finish() == ["short", "long", "too late", "longer"]


def test_more_than_fit_are_refused_at_once(lane: Lane) -> None:
    lane.put("a", 2 * MIB)
    with pytest.raises(RequestError, match=r"^UNAVAILABLE: 1 long prompts of 2097152 bytes wait .* 3145728 bytes; try"):
        lane.put("too large", MIB + 1)
    for name in "bcd":
        lane.put(name)
    with pytest.raises(RequestError, match="^UNAVAILABLE: 4 long prompts .* allowed: 4 prompts"):
        lane.put("too many")
    assert lane.finish() == ["b", "c", "d", "a"]


def test_one_that_is_larger_than_the_lane_has_it_for_itself(lane: Lane) -> None:
    lane.put("huge", 10 * MIB)
    assert lane.finish() == ["huge"]


def test_nothing_is_encoded_in_vain(lane: Lane) -> None:
    lane.put("expired", MIB, deadline=1.0)
    lane.put("gone", gone=True)
    lane.put("in time", deadline=3.0)
    lane.now = 2.0
    assert lane.finish() == [
        "expired: CANCELLED: the request's deadline has passed", "gone: CANCELLED: the client has gone", "in time",
    ]  # fmt: skip


def test_a_failure_does_not_end_the_thread(lane: Lane) -> None:
    lane.put("fails")
    lane.put("next")
    assert lane.finish() == ["fails", "next"]


def test_closing_refuses_what_waits_and_what_comes(lane: Lane) -> None:
    lane.put("waits")
    closing = threading.Thread(target=lane.lane.close)
    closing.start()
    assert poll(lambda: lane.lane._closed)
    with pytest.raises(RequestError, match="UNAVAILABLE: the server is shutting down"):
        lane.put("comes")
    lane._gate.set()
    closing.join(60)
    assert lane.ends == ["waits: UNAVAILABLE: the server is shutting down"]
