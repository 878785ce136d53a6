# SPDX-License-Identifier: Apache-2.0
"""A request's life in the Router."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lightllm_backend.request import FinishReason, Request, RequestError, TokenChunk


class SequenceState(Enum):
    """QUEUED → PREFILLING → RUNNING → FINISHED; FINISHED is reached from each of the others."""

    QUEUED = "queued"
    PREFILLING = "prefilling"  # a part of the prompt is still to be planned
    RUNNING = "running"  # the whole prompt is planned; tokens come
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One request from submit to its last chunk. Only the Router changes it.

    While it holds a row of the request table, what changes in every step (tokens cached, steps to come) is in that
    table's arrays. A finished sequence may still be part of a batch that runs; its tokens are then ignored.
    """

    request: Request
    arrival: float
    state: SequenceState = SequenceState.QUEUED
    row: int | None = None
    queue_seconds: float | None = None  # from its admission until its first chunk, which carries it

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

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
