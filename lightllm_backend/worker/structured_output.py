# SPDX-License-Identifier: Apache-2.0
"""StructuredOutput: rank 0's part in it beside the Router: matchers for new requests, masks for steps. No torch."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import cast

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.grammar.compiler import STACK_BYTES, GrammarCompiler
from lightllm_backend.grammar.matcher import MaskMaker, Matcher
from lightllm_backend.messages.engine_messages import Submit
from lightllm_backend.request import FinishReason, RequestError, SamplingParams, TokenChunk
from lightllm_backend.router.sequence import TextMatcher

# A text of 8 KiB compiles in at most a quarter of a second, one of 128 KiB in up to twenty (perf/data has none of more
# than 2 ms). Large ones wait for each other, on a thread of their own, so that small ones need not.
_SMALL_BYTES = 8 * 1024
_SMALL_THREADS, _LARGE_THREADS = 2, 1

log = logging.getLogger("lightllm.worker")


class StructuredOutput:
    """Holds each request until its matcher, or the error that refuses it, is there. The loop's thread owns it.

    Other threads compile what the texts must follow, so that the loop does not wait.
    """

    def __init__(self, compiler: GrammarCompiler, wake: Callable[[], None]) -> None:
        """wake: makes the loop look; called on other threads."""
        self._compiler = compiler
        self._wake = wake
        self._mask_maker = MaskMaker()
        self._waiting: dict[str, Submit] = {}  # by uid
        self._done: deque[tuple[str, Matcher | RequestError]] = deque()
        self._small: SimpleQueue[Submit | None] = SimpleQueue()
        self._large: SimpleQueue[Submit | None] = SimpleQueue()
        usual = threading.stack_size(STACK_BYTES)
        for queue in [self._small] * _SMALL_THREADS + [self._large] * _LARGE_THREADS:
            threading.Thread(target=self._compile_all, args=(queue,), name="grammar", daemon=True).start()
        threading.stack_size(usual)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, message: Submit) -> None:
        """Take a request; `take_done` returns it at once if what it must follow is known."""
        request = message.request
        self._waiting[request.uid] = message
        known: Matcher | RequestError | None
        try:
            known = self._compiler.cached(request.sampling)
        except RequestError as refusal:
            known = refusal
        if known is not None:
            self._done.append((request.uid, known))
        else:
            is_small = len(request.sampling.structured_output) <= _SMALL_BYTES
            (self._small if is_small else self._large).put(message)

    def take_done(self) -> list[tuple[Submit, Matcher | RequestError]]:
        """Return the requests that need not wait any more."""
        done = []
        while self._done:
            uid, outcome = self._done.popleft()
            message = self._waiting.pop(uid, None)
            if message is not None:
                done.append((message, outcome))
        return done

    def cancel(self, uid: str) -> list[TokenChunk]:
        """Drop a request whose client has gone, if it waits here; return the last chunk of each of its answers.

        uid: of its first answer. Clients cancel all answers, and none has ended before.
        """
        dropped = self._waiting.pop(uid, None)
        uids = () if dropped is None else dropped.request.uids
        return [TokenChunk(one, [], [], FinishReason.CANCELLED) for one in uids]

    def fill(self, matchers: Sequence[TextMatcher | None], masks: NDArray[np.int32]) -> None:
        """Write the masks [matchers, words] of a step; see MaskMaker."""
        self._mask_maker.fill(cast("Sequence[Matcher | None]", matchers), masks)

    def close(self) -> None:
        """Compile nothing any more."""
        self._waiting.clear()
        for queue, count in ((self._small, _SMALL_THREADS), (self._large, _LARGE_THREADS)):
            for _ in range(count):
                queue.put(None)

    def _compile_all(self, queue: SimpleQueue[Submit | None]) -> None:
        while (message := queue.get()) is not None:
            if message.request.uid in self._waiting:  # else its client has gone
                self._done.append((message.request.uid, self._compile(message.request.sampling)))
                self._wake()

    def _compile(self, sampling: SamplingParams) -> Matcher | RequestError:
        try:
            return self._compiler.compile(sampling)
        except RequestError as error:
            return error
        except BaseException as error:  # the request must end whatever happens; a panic in Rust is no Exception
            log.exception("structured output cannot be compiled")
            return RequestError("INTERNAL", f"structured_output cannot be compiled: {error}")
