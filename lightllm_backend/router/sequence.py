# SPDX-License-Identifier: Apache-2.0
"""A request's life in the Router."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.request import FinishReason, Request, RequestError, TokenChunk


class SequenceState(Enum):
    """QUEUED → PREFILLING → RUNNING → FINISHED; FINISHED is reached from each of the others.

    A sequence that runs may be PREEMPTED, and then prefills anew.
    """

    QUEUED = "queued"
    PREEMPTED = "preempted"  # in the queue again, since the pool could not hold it
    PREFILLING = "prefilling"  # a part of what is known is still to be planned
    RUNNING = "running"  # all that is known is planned; tokens come
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One request from submit to its last chunk. Only the Router changes it.

    While it holds a row of the request table, what changes in every step (tokens cached, steps to come) is in that
    table's arrays. A finished sequence may still be part of a batch that runs; its tokens are then ignored.
    """

    request: Request
    handle: int  # what outputs call it
    arrival_index: int  # in order of arrival
    arrival_time: float
    quantiles: NDArray[np.float64]  # what the admission policy has drawn for it
    state: SequenceState = SequenceState.QUEUED
    row: int | None = None
    queue_seconds: float | None = None  # from its admission until its first chunk, which carries it
    # [n] what it has to prefill: the prompt, and what it had generated when it was preempted. Of a sequence that runs,
    # the request table has what follows.
    known_ids: NDArray[np.int32] = field(init=False)
    num_due: int = 0  # tokens that it samples in steps which were in flight when it was preempted

    def __post_init__(self) -> None:
        self.known_ids = np.array(self.request.prompt_ids, dtype=np.int32)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def known_length(self) -> int:
        return len(self.known_ids)

    @property
    def num_generated(self) -> int:
        """Of the tokens to prefill, those behind the prompt."""
        return len(self.known_ids) - self.prompt_length

    @property
    def max_slots(self) -> int:
        """Token slots that it holds in the end. The last token that it generates is never fed back and needs none."""
        return self.prompt_length + self.request.sampling.max_tokens - 1

    def make_chunk(
        self,
        token_ids: list[int],
        log_probs: list[float],
        finish_reason: FinishReason | None = None,
        error: RequestError | None = None,
    ) -> TokenChunk:
        """The next chunk of its answer."""
        waited, self.queue_seconds = self.queue_seconds, None
        request = self.request
        return TokenChunk(request.uid, token_ids, log_probs, finish_reason, len(request.prompt_ids), waited, error)
