# SPDX-License-Identifier: Apache-2.0
"""StructuredOutput: rank 0's part in it beside the Router: matchers for new requests, masks for steps. No torch.

A request with a small text goes to the Router at once, so that its prompt runs while the text is compiled; only its
first token needs the matcher. If that is not there in time, the Router forgets the request until it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.grammar.compiler import STACK_BYTES, GrammarCompiler
from lightllm_backend.grammar.matcher import MaskMaker, Matcher
from lightllm_backend.messages.engine_messages import Submit
from lightllm_backend.request import FinishReason, RequestError, SamplingParams, TokenChunk
from lightllm_backend.router.batch import Batch
from lightllm_backend.router.router import Router

# A text of 8 KiB compiles in at most a quarter of a second, one of 128 KiB in up to twenty (perf/data has none of more
# than 2 ms). Large ones wait for each other, on a thread of their own, so that small ones need not.
_SMALL_BYTES = 8 * 1024
_SMALL_THREADS, _LARGE_THREADS = 2, 1
# How long a step's masks may wait for a text that is being compiled. A usual one takes 1 to 4 ms from the request on, a
# step's forward about as long, so the other requests of the step notice nothing.
PATIENCE_SECONDS = 3e-3

log = logging.getLogger("lightllm.worker")


class Pending:
    """In the place of the matcher of a request that the Router has already."""

    def __init__(self, uid: str) -> None:
        self.uid = uid
        self.compiled = threading.Event()

    @staticmethod
    def accept_all(*_: Any) -> list[bool | RequestError]:
        raise AssertionError("no token is sampled before the matcher is there")

    def copy(self) -> Pending:
        raise AssertionError("a request for several answers waits for its matcher")


class StructuredOutput:
    """Compiles what new requests must follow, on other threads. The loop's thread owns it."""

    def __init__(self, compiler: GrammarCompiler, wake: Callable[[], None]) -> None:
        """wake: makes the loop look; called on other threads."""
        self._compiler = compiler
        self._wake = wake
        self._mask_maker = MaskMaker()
        self._mask_thread = ThreadPoolExecutor(1, "masks")
        self._waiting: dict[str, Submit] = {}  # those whose outcome the Router has not, by uid
        self._routed: set[str] = set()  # of these, the ones that the Router has
        self._ready: dict[str, Matcher | Pending | RequestError] = {}  # what the Router may have, by uid
        self._done: deque[tuple[str, Matcher | RequestError]] = deque()
        self._small: SimpleQueue[tuple[Submit, Pending] | None] = SimpleQueue()
        self._large: SimpleQueue[tuple[Submit, Pending] | None] = SimpleQueue()
        usual = threading.stack_size(STACK_BYTES)
        for queue in [self._small] * _SMALL_THREADS + [self._large] * _LARGE_THREADS:
            threading.Thread(target=self._compile_all, args=(queue,), name="grammar", daemon=True).start()
        threading.stack_size(usual)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, message: Submit) -> None:
        """Take a request; `take_ready` returns it at once if the Router may have it."""
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
            pending = Pending(request.uid)
            if is_small and request.sampling.n == 1:
                self._ready[request.uid] = pending
            (self._small if is_small else self._large).put((message, pending))

    def take_ready(self, router: Router) -> list[tuple[Submit, Matcher | Pending | RequestError]]:
        """Return the requests to submit or refuse, with their matchers; those that the Router has get theirs."""
        self._hand_over(router)
        ready: list[tuple[Submit, Matcher | Pending | RequestError]] = []
        for uid, outcome in self._ready.items():
            if uid not in self._waiting:
                continue  # its client has gone
            if isinstance(outcome, Pending):
                self._routed.add(uid)
                ready.append((self._waiting[uid], outcome))
            else:
                ready.append((self._waiting.pop(uid), outcome))
        self._ready.clear()
        return ready

    def _hand_over(self, router: Router) -> None:
        """Give the Router what has been compiled for the requests that it has."""
        while self._done:
            uid, outcome = self._done.popleft()
            if uid not in self._routed:
                self._ready[uid] = outcome
                continue
            self._routed.remove(uid)
            del self._waiting[uid]
            if isinstance(outcome, RequestError):
                router.refuse(uid, outcome)
            else:
                router.follow(uid, outcome)

    def cancel(self, uid: str) -> list[TokenChunk]:
        """Drop a request whose client has gone, if it waits here; return the last chunk of each of its answers.

        uid: of its first answer. Clients cancel all answers, and none has ended before.
        """
        dropped = self._waiting.pop(uid, None)
        is_routed = uid in self._routed  # then the Router makes its chunk
        self._routed.discard(uid)
        uids = () if dropped is None or is_routed else dropped.request.uids
        return [TokenChunk(one, [], [], FinishReason.CANCELLED) for one in uids]

    def fill(self, router: Router, batch: Batch, masks: NDArray[np.int32]) -> None:
        """Write the masks [structured rows, words] of the newest batch; see MaskMaker."""
        self._mask_maker.fill(self._matchers(router, batch), masks)

    def begin_to_fill(
        self, router: Router, batch: Batch, masks: NDArray[np.int32], then: Callable[[], None]
    ) -> Future[None]:
        """Write the masks on another thread, and call `then` there, whether that has failed or not.

        Nobody may touch the batch's matchers until then.
        """
        matchers = self._matchers(router, batch)
        has_begun = threading.Event()

        def fill() -> None:
            has_begun.set()
            try:
                self._mask_maker.fill(matchers, masks)
            finally:
                then()

        made = self._mask_thread.submit(fill)
        has_begun.wait()  # else that thread may get the interpreter's lock only when the loop next rests
        return made

    def _matchers(self, router: Router, batch: Batch) -> Sequence[Matcher | None]:
        """The matchers of the newest batch. Those that are still compiled get a little time, and else None."""
        pending = [matcher for matcher in router.matchers(batch) if isinstance(matcher, Pending)]
        if pending:
            deadline = time.monotonic() + PATIENCE_SECONDS
            for matcher in pending:
                if not matcher.compiled.wait(max(0.0, deadline - time.monotonic())):
                    router.withdraw(matcher.uid)
                    self._routed.discard(matcher.uid)
            self._hand_over(router)
        return cast("Sequence[Matcher | None]", router.matchers(batch))

    def close(self) -> None:
        """Compile nothing any more."""
        self._waiting.clear()
        self._routed.clear()
        for queue, count in ((self._small, _SMALL_THREADS), (self._large, _LARGE_THREADS)):
            for _ in range(count):
                queue.put(None)
        self._mask_thread.shutdown()

    def _compile_all(self, queue: SimpleQueue[tuple[Submit, Pending] | None]) -> None:
        while (taken := queue.get()) is not None:
            message, pending = taken
            if pending.uid in self._waiting:  # else its client has gone
                self._done.append((pending.uid, self._compile(message.request.sampling)))
                pending.compiled.set()
                self._wake()

    def _compile(self, sampling: SamplingParams) -> Matcher | RequestError:
        try:
            return self._compiler.compile(sampling)
        except RequestError as error:
            return error
        except BaseException as error:  # the request must end whatever happens; a panic in Rust is no Exception
            log.exception("structured output cannot be compiled")
            return RequestError("INTERNAL", f"structured_output cannot be compiled: {error}")
