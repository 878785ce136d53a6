# SPDX-License-Identifier: Apache-2.0
"""Log probabilities of prompt tokens, from the hidden states of a step's prompt chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightllm_backend.router.batch import Batch, ScoredChunk, Scores
from lightllm_backend.runner.device_tables import DeviceTables, packed_positions
from lightllm_backend.runner.staging import Staging

# Tokens whose logits are made at once: 128 MiB in float32 with a vocabulary of 128k. Those of a prompt of 32,768 tokens
# would take 16 GiB.
TOKENS_AT_ONCE = 256


class ScoredTokens(NamedTuple):
    """The tokens of a step whose successors in the prompt get log probabilities."""

    chunks: Sequence[ScoredChunk]
    tokens: Tensor  # [t] int64, index of each in the step
    successors: Tensor  # [t] int64, index of each one's successor in the flattened table of token ids

    @classmethod
    def of(cls, batch: Batch, tables: DeviceTables, staging: Staging) -> ScoredTokens:
        index, counts = np.array([chunk[:2] for chunk in batch.scored], dtype=np.int32).T
        first_tokens = (np.cumsum(batch.lengths) - batch.lengths)[index]
        tokens = packed_positions(first_tokens.astype(np.int32), counts).astype(np.int64)
        positions = packed_positions(batch.starts[index] + 1, counts)
        return cls(
            batch.scored, *staging.upload(tokens, tables.flat_indices(np.repeat(batch.rows[index], counts), positions))
        )


class DeviceScores(NamedTuple):
    """The Scores of all scored chunks of a step, on the device or on their way to the host."""

    chunks: Sequence[ScoredChunk]
    tensors: tuple[Tensor, Tensor, Tensor]  # as in Scores, with the most top tokens of any chunk

    def to_host(self) -> DeviceScores:
        """Start the copy to the host, to pinned memory on a GPU; the step's end says when it is done."""

        def copy(tensor: Tensor) -> Tensor:
            if tensor.device.type == "cpu":
                return tensor
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return target.copy_(tensor, non_blocking=True)

        log_probs, top_ids, top_log_probs = map(copy, self.tensors)
        return DeviceScores(self.chunks, (log_probs, top_ids, top_log_probs))

    def split(self) -> tuple[Scores, ...]:
        """The Scores of each chunk, once they are on the host."""
        log_probs, top_ids, top_log_probs = (tensor.numpy() for tensor in self.tensors)
        scores, end = [], 0
        for _, count, num_top in self.chunks:
            start, end = end, end + count
            mine = (log_probs[start:end], top_ids[start:end, :num_top], top_log_probs[start:end, :num_top])
            scores.append(Scores(*(array.copy() for array in mine)))
        return tuple(scores)


def score(scored: ScoredTokens, logits_of: Callable[[Tensor], Tensor], token_ids: Tensor) -> DeviceScores:
    """Compute the log probabilities of the successors, so many at a time that the logits need little memory.

    logits_of: makes the logits [m, vocab] of these tokens of the step [m] int64. token_ids: the flattened table.
    """
    successors = token_ids.index_select(0, scored.successors).long()
    num_top = max(chunk.num_top for chunk in scored.chunks)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    pieces = [torch.split(tensor, TOKENS_AT_ONCE) for tensor in (scored.tokens, successors)]
    for tokens, chosen in zip(*pieces, strict=True):
        logits = logits_of(tokens).float()
        total = logits.logsumexp(-1, keepdim=True)
        top = logits.topk(min(num_top, logits.shape[1]))
        log_probs = (logits.gather(1, chosen.unsqueeze(1)) - total).squeeze(1)
        parts.append((log_probs, top.indices.int(), top.values - total))
    all_log_probs, top_ids, top_log_probs = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return DeviceScores(scored.chunks, (all_log_probs, top_ids, top_log_probs))
