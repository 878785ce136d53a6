# SPDX-License-Identifier: Apache-2.0
"""The real Router with a device that only tells the time: each sequence ends at its true length, as if by an EOS.

A step takes about as long as LLaMA-7B's shape needs on an H200: the weights once, a little for each sequence, K and V
of each live token once, and the arithmetic of new prompt tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.request import Request, SamplingParams
from lightllm_backend.router.batch import Batch, RouterOutput, StepResult
from lightllm_backend.router.router import Router
from perf.lengths import Lengths

EOS_ID, OTHER_ID = 2, 7
STEP_MS = 3.0
SEQUENCE_MS = 0.0116
KV_TOKEN_MS = 0.000116
PROMPT_TOKEN_MS = 0.0208


def step_seconds(batch: Batch, kv_tokens: int) -> float:
    prompt_tokens = int(batch.lengths[batch.num_decodes :].sum())
    milliseconds = STEP_MS + SEQUENCE_MS * batch.num_decodes + KV_TOKEN_MS * kv_tokens + PROMPT_TOKEN_MS * prompt_tokens
    return milliseconds / 1e3


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


class SimulatedEngine:
    """The worker's loop in simulated time: each step is planned before the tokens of the one before it are known.

    Request i arrives at arrivals[i], which ascend, has the lengths lengths[i], and asks for max_tokens (None: its
    length is known). `router_for` makes the Router with a clock. tenants: whose each request is.
    """

    def __init__(
        self,
        router_for: Callable[[Callable[[], float]], Router],
        num_rows: int,
        lengths: Sequence[Lengths],
        arrivals: Sequence[float],
        max_tokens: int | None = None,
        tenants: Sequence[str] | None = None,
    ) -> None:
        self._now = 0.0
        self._router = router_for(lambda: self._now)
        self._lengths = lengths
        self._arrivals = arrivals
        self._max_tokens = max_tokens
        self._tenants = tenants or [""] * len(lengths)
        self._ends_at = np.zeros(num_rows, dtype=np.int64)  # by row: the context that an EOS follows
        self._outcome = Outcome(np.full(len(lengths), np.nan), np.full(len(lengths), np.nan))

    def run(self) -> Outcome:
        arrived = 0
        in_flight: deque[tuple[Batch, StepResult, float]] = deque()
        while arrived < len(self._lengths) or self._router.has_work:
            while arrived < len(self._lengths) and self._arrivals[arrived] <= self._now:
                self._router.submit(self._request(arrived), arrived)
                arrived += 1
            batch = self._router.next_batch()
            if batch is not None:
                in_flight.append((batch, self._compute(batch), self._record(batch)))
            if in_flight and (batch is None or len(in_flight) > 1):
                done, result, seconds = in_flight.popleft()
                self._now += seconds
                self._tell(self._router.apply(done, result))
            elif not in_flight:
                self._now = self._arrivals[arrived]
        self._outcome.seconds = self._now
        stats = self._router.stats()
        self._outcome.output_tokens, self._outcome.preemptions = stats.generated_tokens_total, stats.preemptions_total
        self._outcome.prompt_tokens = stats.prompt_tokens_total
        assert self._outcome.output_tokens == sum(output for _, output in self._lengths), "a request has another length"
        return self._outcome

    def _request(self, number: int) -> Request:
        prompt, output = self._lengths[number]
        sampling = SamplingParams(max_tokens=self._max_tokens or output, seed=number)
        # Prompts differ from the first token on: nothing is shared.
        return Request(str(number), (number, *range(1, prompt)), sampling, tenant=self._tenants[number])

    def _compute(self, batch: Batch) -> StepResult:
        for admission in batch.admitted:
            self._ends_at[admission.row] = sum(self._lengths[admission.sampling.seed]) - 1
        contexts = (batch.starts + batch.lengths)[batch.samples]
        ends = contexts == self._ends_at[batch.rows[batch.samples]]
        return StepResult(np.where(ends, EOS_ID, OTHER_ID).astype(np.int32))

    def _record(self, batch: Batch) -> float:
        stats = self._router.stats()
        seconds = step_seconds(batch, stats.kv_tokens_used)
        self._outcome.durations.append(seconds)
        self._outcome.pool_shares.append(stats.kv_tokens_used / stats.kv_tokens_total)
        self._outcome.running.append(stats.running_requests)
        if stats.queued_requests:
            self._outcome.steps_with_queue = len(self._outcome.durations)
        return seconds

    def _tell(self, output: RouterOutput) -> None:
        for chunk in output.chunks:
            number = int(chunk.uid)
            if chunk.queue_seconds is not None:
                self._outcome.first_token_seconds[number] = self._now - self._arrivals[number]
            if chunk.finish_reason is not None:
                self._outcome.end_seconds[number] = self._now - self._arrivals[number]
