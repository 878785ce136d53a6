# SPDX-License-Identifier: Apache-2.0
"""StepArrays: the arrays that a step reads beside the tables. `fill` writes a Batch into them, padded to a Bucket."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.device_tables import DeviceTables, packed_positions
from lightllm_backend.runner.staging import Layout

_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)

_NONE = np.empty(0, dtype=np.int32)
EMPTY_BATCH = Batch(_NONE, _NONE, _NONE, _NONE[np.newaxis], np.empty(0, dtype=np.bool_), 0, ())


class Bucket(NamedTuple):
    """The shape of a step: the most tokens, the most decodes among them, and the most prompts of the others.

    Its cost depends on the tokens; unused room for decodes and prompts is nearly free.
    """

    tokens: int
    decodes: int
    prefills: int = 0

    @classmethod
    def of(cls, batch: Batch) -> Bucket:
        """The bucket that the batch fills exactly."""
        return cls(batch.slots.shape[1], batch.num_decodes, len(batch.rows) - batch.num_decodes)

    @property
    def slots_stride(self) -> int:
        """Where the slots of a group begin behind those of the group before: aligned, see staging.py."""
        return -(-self.tokens // 4) * 4

    @property
    def samples(self) -> int:
        """The most sequences that can sample a token."""
        return min(self.decodes + self.prefills, self.tokens)

    def layout(self, num_groups: int = 1) -> Layout:
        """The layout of its StepArrays in one buffer."""
        t, n, m = self.tokens, self.decodes + self.prefills, self.samples
        lengths = StepArrays(t, m, m, t, num_groups * self.slots_stride, t, n, n, self.prefills + 1)
        return Layout([(_INT64, length) for length in lengths[:3]] + [(_INT32, length) for length in lengths[3:]])


class StepArrays(NamedTuple):
    """The arrays of a step of a bucket's shape, on the host or the device: t tokens of n sequences, padding included.

    Tokens: first the decodes, then the prompts, then padding, which has no slot and reads the tables' padding row.
    Sequences: first the decodes, padded to the bucket's count, then the prompts, padded too; padding has no context and
    no queries. Samples: first those of the sampling sequences, without gaps; padding repeats the logits of token 0 and
    writes its choice to the padding row.
    """

    token_indices: Any  # [t] int64, index of each token in the flattened tables
    last_tokens: Any  # [samples] int64, the tokens whose logits the step computes
    sampled_indices: Any  # [samples] int64, index of each sampled token in the flattened table of token ids
    positions: Any  # [t] int32
    slots: Any  # [groups * slots_stride] int32; -1 is padding
    rotary_lengths: Any  # [t] int32, see models.layers.StepInput
    rows: Any  # [n] int32
    context_lengths: Any  # [n] int32
    query_starts: Any  # [prefills + 1] int32, the first token of each prompt, and the end of the last one


def fill(arrays: StepArrays, batch: Batch, bucket: Bucket, tables: DeviceTables) -> None:
    """Write a batch that fits the bucket into the bucket's arrays on the host, and pad them."""
    tokens, decodes, prefills = Bucket.of(batch)
    positions = packed_positions(batch.starts, batch.lengths)
    context_lengths = batch.starts + batch.lengths
    rotary_lengths = np.maximum(np.repeat(tables.rotary_lengths[batch.rows], batch.lengths), positions + 1)
    token_indices = tables.flat_indices(np.repeat(batch.rows, batch.lengths), positions)
    for target, values, padding in (
        (arrays.token_indices, token_indices, tables.padding_index),
        (arrays.positions, positions, 0),
        (arrays.rotary_lengths, rotary_lengths, 0),
    ):
        target[:tokens] = values
        target[tokens:] = padding
    assert len(batch.slots) == tables.num_groups or not batch.slots.any(), "each layer group has slots of its own"
    slots = arrays.slots.reshape(tables.num_groups, bucket.slots_stride)
    slots[:, :tokens] = batch.slots
    slots[:, tokens:] = -1
    for target, values, padding in (
        (arrays.rows, batch.rows, tables.padding_row),
        (arrays.context_lengths, context_lengths, 0),
    ):
        target[:decodes] = values[:decodes]
        target[decodes : bucket.decodes] = padding
        target[bucket.decodes : bucket.decodes + prefills] = values[decodes:]
        target[bucket.decodes + prefills :] = padding

    ends = np.cumsum(batch.lengths)
    arrays.query_starts[0] = decodes
    arrays.query_starts[1 : prefills + 1] = ends[decodes:]
    arrays.query_starts[prefills + 1 :] = tokens
    num_sampled = np.count_nonzero(batch.samples)
    arrays.last_tokens[:num_sampled] = ends[batch.samples] - 1
    arrays.last_tokens[num_sampled:] = 0
    arrays.sampled_indices[:num_sampled] = tables.flat_indices(
        batch.rows[batch.samples], context_lengths[batch.samples]
    )
    arrays.sampled_indices[num_sampled:] = tables.padding_index
