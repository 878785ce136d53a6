# SPDX-License-Identifier: Apache-2.0
"""One step as plain arrays: the Batch that the Router plans, its StepResult, and the RouterOutput for clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.request import SamplingParams, TokenChunk


@dataclass(frozen=True)
class Admission:
    """The new owner of a row of the request table. The batch that carries it has its first chunk."""

    row: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    generated_ids: tuple[int, ...] = ()  # before a preemption; prefilled after the prompt
    cached_slots: tuple[int, ...] = ()  # of the first tokens, from the prefix cache
    is_recomputed: bool = False  # it has outgrown Router's recompute_at: all its tokens turn as those of a long prompt


class ScoredChunk(NamedTuple):
    """A prompt chunk whose tokens' successors get log probabilities."""

    batch_index: int  # of the sequence
    num_tokens: int  # the first so many tokens of the chunk have a successor in the prompt
    num_top: int  # how many of the likeliest tokens in the successor's place are wanted too


@dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of one step: first those that decode a token, then those that prefill a chunk of their prompt.

    A row may have changed its owner since the previous batch: `admitted` says so, and steps run in order.
    """

    rows: NDArray[np.int32]  # [n] rows of the request table
    starts: NDArray[np.int32]  # [n] tokens cached before this step
    lengths: NDArray[np.int32]  # [n] new tokens; 1 for a decode
    slots: NDArray[np.int32]  # [layer groups, sum(lengths)] slots of the new tokens, packed in the order of rows
    samples: NDArray[np.bool_]  # [n] whether the step samples a token: for decodes and last chunks of prompts
    num_decodes: int
    admitted: tuple[Admission, ...]  # for the runner to upload before this step
    scored: tuple[ScoredChunk, ...] = ()


class Scores(NamedTuple):
    """Log probabilities of t prompt tokens, in the model's own distribution."""

    log_probs: NDArray[np.float32]  # [t]
    top_ids: NDArray[np.int32]  # [t, k] the k likeliest tokens in the place of each, the likeliest first
    top_log_probs: NDArray[np.float32]  # [t, k]

    @classmethod
    def empty(cls, count: int, num_top: int) -> Scores:
        return cls(
            np.empty(count, dtype=np.float32),
            np.empty((count, num_top), dtype=np.int32),
            np.empty((count, num_top), dtype=np.float32),
        )


class TopLogProbs(NamedTuple):
    """The likeliest tokens of a step's sequences that ask for them."""

    samples: NDArray[np.int64]  # [m] which of the step's sampled tokens
    pairs: NDArray[Any]  # [m, k] TOP_LOG_PROB, the likeliest first; k is the most that any of them asks for

    def by_sample(self) -> dict[int, NDArray[Any]]:
        """The pairs [k] of each."""
        return dict(zip(self.samples.tolist(), self.pairs, strict=True))


@dataclass(frozen=True, eq=False)
class StepResult:
    """The tokens that a step sampled, in the order of the batch's sampling rows."""

    token_ids: NDArray[np.int32]  # [n_sampled]; -1: the model's logits are not numbers
    log_probs: NDArray[np.float32] | None = None  # [n_sampled]
    seconds: float = 0.0  # on the device
    scores: tuple[Scores, ...] = ()  # of the batch's scored chunks, in order
    top_log_probs: TopLogProbs | None = None
    launch_seconds: float = 0.0  # of the host, if the device is a GPU


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """What clients receive from a step.

    Arrays carry the sequences that get one more token and go on, which are most of them. A chunk carries whatever needs
    more: a first token, a log probability, an end.
    """

    handles: NDArray[np.int64]  # [n] as given to `Router.submit`
    token_ids: NDArray[np.int32]  # [n]
    chunks: list[TokenChunk]  # of other sequences

    @classmethod
    def of_chunks(cls, chunks: list[TokenChunk]) -> RouterOutput:
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), chunks)
