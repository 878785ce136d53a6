# SPDX-License-Identifier: Apache-2.0
"""Sequence: the state of one request in the Router."""

from __future__ import annotations

from collections.abc import Sequence as Sequential
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.request import FinishReason, PromptLogProbs, Request, RequestError, TokenChunk
from lightllm_backend.router.batch import Scores


class TextMatcher(Protocol):
    """What the text of a sequence must follow, and how far it has come."""

    @staticmethod
    def accept_all(matchers: Sequential[Any], token_ids: Sequential[int]) -> list[bool | RequestError]:
        """Give each of these matchers its next token; return whether its text is complete, so that nothing may follow.

        A RequestError in the place of that ends the request: the token does not fit.
        """

    def copy(self) -> TextMatcher:
        """Return a matcher that has come as far, for another answer."""


class SequenceState(Enum):
    """QUEUED → PREFILLING → RUNNING → FINISHED. Every state can go to FINISHED.

    A PREFILLING or RUNNING sequence may become PREEMPTED; it prefills again later.
    """

    QUEUED = "queued"
    # In front of the queue: because the pool was full, or as a further answer to a prompt whose first one runs.
    PREEMPTED = "preempted"
    PREFILLING = "prefilling"  # some of its known tokens are not planned yet
    RUNNING = "running"  # all its known tokens are planned; it decodes
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One request, from `submit` to its last chunk. Only the Router changes it.

    While it has a row of the request table, that table's arrays hold what changes in every step (cached tokens,
    remaining steps). A finished sequence may still be part of a running batch; the Router then ignores its tokens.
    """

    request: Request
    handle: int  # its name in outputs, given to `submit`
    arrival_index: int  # ascends in order of arrival; urgent requests count down from -1
    arrival_time: float
    quantiles: NDArray[np.float64]  # drawn by the admission policy
    state: SequenceState = SequenceState.QUEUED
    row: int | None = None
    queue_seconds: float | None = None  # set at admission; the first chunk takes it
    num_cached_tokens: int = 0  # of the prompt, set at the first admission; the first chunk takes it
    # [n] the token ids to prefill: the prompt, and the tokens generated before a preemption. The request table has the
    # tokens that come later.
    known_ids: NDArray[np.int32] = field(init=False)
    matcher: TextMatcher | None = None  # of structured output; has accepted all generated tokens that are known
    num_due: int = 0  # tokens still to come from steps that were in flight when it was preempted
    # Further answers to its prompt. They wait outside the queue until this one is admitted, and end if it ends before.
    copies: list[Sequence] = field(default_factory=list)
    tree: str = ""  # the name of a tree of the prefix cache that it shares with the request's other answers alone
    scores: Scores | None = None  # of the prompt's tokens but the first, so far as steps have computed them

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
        """How many of the known tokens are generated ones."""
        return len(self.known_ids) - self.prompt_length

    @property
    def max_slots(self) -> int:
        """The most token slots it can hold in a layer group. The last token of max_tokens is never fed back and needs
        none."""
        return self.prompt_length + self.request.sampling.max_sampled - 1

    @property
    def scores_prompt(self) -> bool:
        """Whether its next prefill computes log probabilities of the prompt: until the first token is known."""
        return self.request.sampling.prompt_logprobs >= 0 and self.num_generated == 0

    def take_scores(self, start: int, scores: Scores) -> None:
        """Record what a step has computed behind the prompt tokens from `start` on; after a preemption, once more."""
        if self.scores is None:
            self.scores = Scores.empty(self.prompt_length - 1, self.request.sampling.prompt_logprobs)
        for mine, new in zip(self.scores, scores, strict=True):
            mine[start : start + len(new)] = new

    def make_chunk(
        self,
        token_ids: list[int],
        log_probs: list[float],
        finish_reason: FinishReason | None = None,
        error: RequestError | None = None,
        top_log_probs: bytes = b"",
    ) -> TokenChunk:
        """Make the next chunk of the answer. The first chunk carries what comes once."""
        waited, self.queue_seconds = self.queue_seconds, None
        num_cached_tokens, self.num_cached_tokens = self.num_cached_tokens, 0
        scores, self.scores = self.scores, None
        request = self.request
        is_complete = bool(token_ids) or finish_reason is FinishReason.LENGTH
        prompt = PromptLogProbs(*(array.tobytes() for array in scores)) if scores and is_complete else None
        return TokenChunk(
            request.uid,
            token_ids,
            log_probs,
            finish_reason,
            len(request.prompt_ids),
            waited,
            error,
            prompt,
            top_log_probs,
            num_cached_tokens,
        )
