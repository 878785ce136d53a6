# SPDX-License-Identifier: Apache-2.0
"""PromptLane: encodes long prompts on a thread of its own, so that short ones never wait for them. No torch."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lightllm_backend.request import RequestError

# How much longer a prompt may be kept waiting for each of its bytes: a prompt of 1 MiB lets shorter ones overtake it
# that arrive within ten seconds, which is ten times as long as encoding it takes. So a long prompt does not hold up
# those of a few pages, and none waits for ever.
SECONDS_PER_BYTE = 10 / 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LongPrompt:
    """One prompt in the lane. Exactly one of `encode` and `refuse` is called, once, and on the lane's thread."""

    size: int  # bytes
    deadline: float | None  # time.monotonic() seconds
    is_gone: Callable[[], bool]  # whether the client has gone
    encode: Callable[[], None]
    refuse: Callable[[RequestError], None]


@dataclass(order=True)
class _Waiting:
    turn: float
    number: int  # order of arrival, among equals
    prompt: LongPrompt = field(compare=False)


class PromptLane:
    """Holds at most `max_prompts` prompts of `max_bytes` together, and refuses more. Shorter prompts go before longer.

    A prompt whose deadline has passed or whose client has gone is refused without being encoded.
    """

    def __init__(self, max_prompts: int, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_prompts, self._max_bytes = max_prompts, max_bytes
        self._clock = clock
        self._condition = threading.Condition()  # guards what follows
        self._waiting: list[_Waiting] = []  # a heap
        self._bytes = 0  # of the waiting prompts
        self._closed = False
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="long-prompts", daemon=True)
        self._thread.start()

    def put(self, prompt: LongPrompt) -> None:
        """Queue a prompt; raise RequestError UNAVAILABLE if there is no room, and then call nothing of it."""
        with self._condition:
            count = len(self._waiting)
            if self._closed:
                raise _closed()
            if count and (count >= self._max_prompts or self._bytes + prompt.size > self._max_bytes):
                raise RequestError(
                    "UNAVAILABLE",
                    f"{count} long prompts of {self._bytes} bytes wait to be tokenized, and this one has {prompt.size} "
                    f"bytes; allowed: {self._max_prompts} prompts, {self._max_bytes} bytes; try again",
                )
            turn = self._clock() + prompt.size * SECONDS_PER_BYTE
            heapq.heappush(self._waiting, _Waiting(turn, next(self._numbers), prompt))
            self._bytes += prompt.size
            self._condition.notify()

    def close(self) -> None:
        """Refuse the waiting prompts and end the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._closed)
                closed = self._closed
                error = _closed() if closed else RequestError("CANCELLED", "the request's deadline has passed")
                refused = self._take_all() if closed else self._take_expired()
                prompt = self._take_next() if self._waiting else None
            for one in refused:
                _refuse(one, error)
            if prompt:
                _encode(prompt)
            if closed:
                return

    def _take_next(self) -> LongPrompt:
        prompt = heapq.heappop(self._waiting).prompt
        self._bytes -= prompt.size
        return prompt

    def _take_all(self) -> list[LongPrompt]:
        prompts = [one.prompt for one in self._waiting]
        self._waiting, self._bytes = [], 0
        return prompts

    def _take_expired(self) -> list[LongPrompt]:
        now = self._clock()
        all_waiting, self._waiting = self._waiting, []
        prompts = []
        for one in all_waiting:
            if one.prompt.deadline is not None and one.prompt.deadline < now:
                prompts.append(one.prompt)
            else:
                self._waiting.append(one)
        if prompts:
            heapq.heapify(self._waiting)
            self._bytes -= sum(prompt.size for prompt in prompts)
        return prompts


def _closed() -> RequestError:
    return RequestError("UNAVAILABLE", "the server is shutting down")


def _encode(prompt: LongPrompt) -> None:
    try:
        if prompt.is_gone():
            prompt.refuse(RequestError("CANCELLED", "the client has gone"))
        else:
            prompt.encode()
    except Exception:  # it must not end the thread, on which the others wait
        log.exception("a long prompt could not be encoded")


def _refuse(prompt: LongPrompt, error: RequestError) -> None:
    try:
        prompt.refuse(error)
    except Exception:
        log.exception("a long prompt could not be refused")
