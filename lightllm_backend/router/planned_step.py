# SPDX-License-Identifier: Apache-2.0
"""PlannedStep: what the Router keeps of a step until the step's tokens arrive."""

from __future__ import annotations

from collections.abc import Sequence as Sequential
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.router.batch import Admission, Batch, ScoredChunk
from lightllm_backend.router.request_table import RequestTable


class PromptChunk(NamedTuple):
    """The tokens that one sequence prefills in a step."""

    row: int
    start: int
    slots: NDArray[np.int32]  # [groups, tokens]
    is_last: bool
    num_scored: int  # tokens whose successors get log probabilities
    num_top: int  # see ScoredChunk

    @property
    def num_tokens(self) -> int:
        return self.slots.shape[1]


class Decodes(NamedTuple):
    """The sequences that decode one token each in a step."""

    rows: NDArray[np.int64]  # [n] int64: numpy indexes more slowly by other integers
    starts: NDArray[np.int32]  # [n]
    slots: NDArray[np.int32]  # [groups, n]


class PlannedStep(NamedTuple):
    """What `Router.apply` needs about a batch.

    It names sequences by arrival index, since a row may have another owner by the time the tokens arrive.
    """

    batch: Batch
    rows: NDArray[np.int64]  # [n_sampled] the rows that sample a token
    arrival_indices: NDArray[np.int64]  # [n_sampled]
    positions: NDArray[np.int32]  # [n_sampled] of the token in its sequence
    holds_row: NDArray[np.bool_]  # [n_sampled] cleared when the sequence releases its row
    is_plain: NDArray[np.bool_]  # [n_sampled] emit just the token id unless the sequence ends
    structured: NDArray[np.bool_]  # [n_sampled] the token must follow the sequence's matcher
    may_end: NDArray[np.bool_]  # [n_sampled] an ending id may end the sequence: min_tokens is reached
    ending_ids: NDArray[np.int32]  # [n_sampled, ids] EOS and stop ids, padded with NO_TOKEN
    is_final: NDArray[np.bool_]  # [n_sampled] the token is the last of max_tokens
    scored_arrivals: tuple[int, ...]  # arrival indices of the batch's scored chunks

    @classmethod
    def of(cls, batch: Batch, table: RequestTable) -> PlannedStep:
        rows = batch.rows[batch.samples].astype(np.int64)
        positions = table.cached[rows]
        is_plain = ~table.with_log_probs[rows]
        is_plain[batch.num_decodes :] = False  # a first token carries its request's time in the queue
        return cls(
            batch=batch,
            rows=rows,
            arrival_indices=table.arrival_indices[rows],
            positions=positions,
            holds_row=np.ones(len(rows), dtype=np.bool_),
            is_plain=is_plain,
            structured=table.structured[rows],
            may_end=positions >= table.may_end_from[rows],
            ending_ids=table.ending_ids[rows, : table.num_ending_ids[rows].max(initial=0)],
            is_final=table.remaining[rows] == 0,
            scored_arrivals=tuple(int(table.arrival_indices[batch.rows[chunk.batch_index]]) for chunk in batch.scored),
        )


def make_batch(decodes: Decodes, chunks: Sequential[PromptChunk], admitted: Sequential[Admission]) -> Batch:
    return Batch(
        rows=_followed_by(decodes.rows.astype(np.int32), [chunk.row for chunk in chunks]),
        starts=_followed_by(decodes.starts, [chunk.start for chunk in chunks]),
        lengths=_followed_by(np.ones(len(decodes.rows), dtype=np.int32), [chunk.num_tokens for chunk in chunks]),
        slots=np.concatenate([decodes.slots, *(chunk.slots for chunk in chunks)], axis=1),
        samples=_followed_by(np.ones(len(decodes.rows), dtype=np.bool_), [chunk.is_last for chunk in chunks]),
        num_decodes=len(decodes.rows),
        admitted=tuple(admitted),
        scored=tuple(
            ScoredChunk(len(decodes.rows) + index, chunk.num_scored, chunk.num_top)
            for index, chunk in enumerate(chunks)
            if chunk.num_scored
        ),
    )


_Scalar = TypeVar("_Scalar", bound=np.generic)


def _followed_by(decodes: NDArray[_Scalar], prefills: list[int]) -> NDArray[_Scalar]:
    return np.concatenate([decodes, np.array(prefills, dtype=decodes.dtype)])
