# SPDX-License-Identifier: Apache-2.0
"""The real Router with a device that only tells the time: each sequence ends at its true length, as if by an EOS.

Unless told otherwise, a step takes about as long as LLaMA-7B's shape needs on an H200: the weights once, a little for
each sequence, K and V of each live token once, and the arithmetic of new prompt tokens. perf/step_times.py reads the
time of a step from stored measurements instead.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.request import Request, SamplingParams, TokenChunk
from lightllm_backend.router.batch import Batch, StepResult
from lightllm_backend.router.router import Router
from lightllm_backend.worker.launch_timer import LaunchTimer
from perf.lengths import Lengths

EOS_ID = 2
FIRST_ID = 3  # the token at position p, from 1 on, is FIRST_ID + p
STEP_MS = 3.0
SEQUENCE_MS = 0.0116
KV_TOKEN_MS = 0.000116
PROMPT_TOKEN_MS = 0.0208

MakeRouter = Callable[[Callable[[], float]], Router]  # with the clock
StepSeconds = Callable[[Batch, int], float]  # of a batch, with so many tokens in the pool that sequences hold


def step_seconds(batch: Batch, kv_tokens: int) -> float:
    prompt_tokens = int(batch.lengths[batch.num_decodes :].sum())
    milliseconds = STEP_MS + SEQUENCE_MS * batch.num_decodes + KV_TOKEN_MS * kv_tokens + PROMPT_TOKEN_MS * prompt_tokens
    return milliseconds / 1e3


def prompt_ids(first: int, length: int) -> tuple[int, ...]:
    """Prompts with different first tokens share nothing; of two with the same one, the longer begins with the shorter.

    It also begins with the answer to the shorter, since the device samples the token that belongs to a position.
    """
    return (first, *range(FIRST_ID + 1, FIRST_ID + length))


class SimulatedEngine:
    """The worker's loop in simulated time, turn by turn: each step is planned before the last one's tokens are known.

    `turn_at` is when the loop next has something to do, and infinite while it waits for a request. Whoever drives the
    engine calls `submit` and `turn` in the order of time.
    """

    def __init__(
        self,
        make_router: MakeRouter,
        num_rows: int,
        tell: Callable[[float, TokenChunk], None],
        step_seconds: StepSeconds = step_seconds,
        plan_late: bool = False,
    ) -> None:
        """tell: is called with the time and each chunk. plan_late: as the worker does, by its LaunchTimer."""
        self.now = 0.0
        self.turn_at = math.inf
        self.router = make_router(lambda: self.now)
        self.on_step: Callable[[float], None] = lambda seconds: None  # is called when a step is planned
        self._tell = tell
        self.step_seconds = step_seconds
        self._timer = LaunchTimer(lambda: self.now) if plan_late else None
        self._contexts: dict[int, int] = {}  # by the request's seed: the context that an EOS follows
        self._ends_at = np.zeros(num_rows, dtype=np.int64)  # [rows] the same
        self._turns = self._loop()
        next(self._turns)

    def submit(self, now: float, request: Request, output: int) -> None:
        """Its answer is to have so many tokens. The seed tells requests apart."""
        self.now = now
        self._contexts[request.sampling.seed] = len(request.prompt_ids) + output - 1
        self.router.submit(request, request.sampling.seed)
        if math.isinf(self.turn_at):
            self.turn_at = now

    def turn(self) -> None:
        self.now = self.turn_at
        self.turn_at = next(self._turns)

    def _loop(self) -> Iterator[float]:
        """Yields the time of the next turn."""
        in_flight: deque[tuple[Batch, StepResult, float]] = deque()
        device_free_at = 0.0
        while True:
            while not in_flight and not self.router.has_work:
                yield math.inf
            if self._timer:
                if (spare := self._timer.spare_seconds()) > 0:
                    yield min(self.now + spare, in_flight[0][-1])
                self._timer.planning()
            batch = self.router.next_batch()
            if batch is not None:
                result, seconds = self._compute(batch), self._record(batch)
                device_free_at = max(device_free_at, self.now) + seconds
                in_flight.append((batch, result, device_free_at))
                if self._timer:
                    self._timer.launched(batch, all_admitted=not self.router.has_queue)
            assert in_flight, "the Router runs what has not ended"
            while in_flight and (batch is None or len(in_flight) > 1):
                yield in_flight[0][-1]
                done, result, _ = in_flight.popleft()
                if self._timer:
                    self._timer.finished()
                for chunk in self.router.apply(done, result).chunks:
                    self._tell(self.now, chunk)

    def _compute(self, batch: Batch) -> StepResult:
        for admission in batch.admitted:
            self._ends_at[admission.row] = self._contexts[admission.sampling.seed]
        contexts = (batch.starts + batch.lengths)[batch.samples]
        ends = contexts == self._ends_at[batch.rows[batch.samples]]
        return StepResult(np.where(ends, EOS_ID, FIRST_ID + contexts).astype(np.int32))

    def _record(self, batch: Batch) -> float:
        seconds = self.step_seconds(batch, self.router.stats().kv_tokens_used)
        self.on_step(seconds)
        return seconds


@dataclass
class Outcome:
    """What came of a workload, in simulated seconds."""

    first_token_seconds: NDArray[np.float64]  # [requests] from a request's arrival
    end_seconds: NDArray[np.float64]  # [requests] the same
    seconds: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0  # computed, so again after a preemption
    preemptions: int = 0
    durations: list[float] = field(default_factory=list)  # a value a step
    pool_shares: list[float] = field(default_factory=list)  # a value a step: of the slots, those with a live token
    running: list[int] = field(default_factory=list)  # a value a step
    steps_with_queue: int = 0  # until the queue was empty for the last time


def simulate_alone(
    make_router: MakeRouter,
    num_rows: int,
    lengths: Sequence[Lengths],
    arrivals: Sequence[float],
    max_tokens: int | None = None,
    tenants: Sequence[str] | None = None,
    step_seconds: StepSeconds = step_seconds,
    plan_late: bool = False,
) -> Outcome:
    """One engine under a workload whose requests share nothing.

    Request i arrives at arrivals[i], which ascend, has the lengths lengths[i], and asks for max_tokens (None: its
    length is known). tenants: whose each request is.
    """
    outcome = Outcome(np.full(len(lengths), np.nan), np.full(len(lengths), np.nan))

    def tell(now: float, chunk: TokenChunk) -> None:
        number = int(chunk.uid)
        if chunk.queue_seconds is not None:
            outcome.first_token_seconds[number] = now - arrivals[number]
        if chunk.finish_reason is not None:
            outcome.end_seconds[number] = now - arrivals[number]
            outcome.seconds = now

    def record(seconds: float) -> None:
        stats = engine.router.stats()
        outcome.durations.append(seconds)
        outcome.pool_shares.append(stats.kv_tokens_used / stats.kv_tokens_total)
        outcome.running.append(stats.running_requests)
        if stats.queued_requests:
            outcome.steps_with_queue = len(outcome.durations)

    engine = SimulatedEngine(make_router, num_rows, tell, step_seconds, plan_late)
    engine.on_step = record
    arrived = 0
    while arrived < len(lengths) or math.isfinite(engine.turn_at):
        if arrived < len(lengths) and arrivals[arrived] <= engine.turn_at:
            prompt, output = lengths[arrived]
            sampling = SamplingParams(max_tokens=max_tokens or output, seed=arrived)
            tenant = tenants[arrived] if tenants else ""
            request = Request(str(arrived), prompt_ids(arrived, prompt), sampling, tenant=tenant)
            engine.submit(arrivals[arrived], request, output)
            arrived += 1
        else:
            engine.turn()
    stats = engine.router.stats()
    outcome.output_tokens, outcome.preemptions = stats.generated_tokens_total, stats.preemptions_total
    outcome.prompt_tokens = stats.prompt_tokens_total
    assert outcome.output_tokens == sum(output for _, output in lengths), "a request has another length"
    return outcome
