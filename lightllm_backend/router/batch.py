# SPDX-License-Identifier: Apache-2.0
"""One step of the engine as plain arrays: what the Router plans, each rank's ModelRunner runs, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.request import SamplingParams, TokenChunk


@dataclass(frozen=True)
class Admission:
    """A sequence that a row of the request table now belongs to. Its first chunk is in the same batch."""

    row: int
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    generated_ids: tuple[int, ...] = ()  # before it was preempted; prefilled behind the prompt
    cached_slots: tuple[int, ...] = ()  # of the first tokens, which need not be computed


@dataclass(frozen=True, eq=False)
class Batch:
    """The sequences of one step: first those that decode one token, then those that prefill a chunk of their prompt.

    A row may belong to another sequence than in the batch before: steps run in order, and `admitted` says so.
    """

    rows: NDArray[np.int32]  # [n] rows of the request table
    starts: NDArray[np.int32]  # [n] tokens that are cached before this step
    lengths: NDArray[np.int32]  # [n] new tokens; 1 for a decode
    slots: NDArray[np.int32]  # [sum(lengths)] token slots of the new tokens, packed in the order of rows
    samples: NDArray[np.bool_]  # [n] a token is sampled after the last new one: decodes and the last chunk of a prompt
    num_decodes: int
    admitted: tuple[Admission, ...]  # what the runner must upload before this step


@dataclass(frozen=True, eq=False)
class StepResult:
    """The tokens that a batch sampled, in the order of its rows that sample."""

    token_ids: NDArray[np.int32]  # [n_sampled]
    log_probs: NDArray[np.float32] | None = None  # [n_sampled]
    seconds: float = 0.0  # that the device took


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """What clients get from a step. Most sequences get one more token and go on, and arrays say it; of the others there
    is more to say, in a chunk: first tokens, tokens with a log probability, ends.
    """

    handles: NDArray[np.int64]  # [n] what `submit` was told to call these sequences
    token_ids: NDArray[np.int32]  # [n]
    chunks: list[TokenChunk]  # of other sequences

    @classmethod
    def of_chunks(cls, chunks: list[TokenChunk]) -> RouterOutput:
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), chunks)
