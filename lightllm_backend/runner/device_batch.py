# SPDX-License-Identifier: Apache-2.0
"""What the device knows of the running requests, and how a Batch becomes the arrays of one step.

The tables are indexed by request row, so a step needs nothing from the host that the host does not have when it plans:
the token that step N samples is written to the table on the device, and step N+1 reads it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lightllm_backend.router.batch import Admission, Batch
from lightllm_backend.runner.staging import Layout, Staging

_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)

# Entries of a row: 64 bytes.
_ROW_ALIGNMENT = 16
# Tokens of newcomers.
_ADMITTED_AT_ONCE = 1 << 15

_NONE = np.empty(0, dtype=np.int32)
EMPTY_BATCH = Batch(_NONE, _NONE, _NONE, _NONE, np.empty(0, dtype=np.bool_), 0, ())


class RequestTables:
    """`tokens[row, position]`: prompt and generated ids. `slots[row, position]`: where K and V lie (req_to_token).

    Any row has room for the longest sequence, since requests that share a beginning may be many and long at once.
    """

    def __init__(self, num_rows: int, max_length: int, device: torch.device) -> None:
        self.padding_row = num_rows  # belongs to no request
        self.tokens = torch.zeros(self.shape(num_rows, max_length), dtype=torch.int32, device=device)
        self.slots = torch.zeros_like(self.tokens)
        self.prompt_lengths = np.zeros(num_rows, dtype=np.int32)

    @staticmethod
    def shape(num_rows: int, max_length: int) -> tuple[int, int]:
        """Of each table. Rows are aligned, so that whatever the length, kernels are compiled and read alike."""
        return num_rows + 1, -(-max_length // _ROW_ALIGNMENT) * _ROW_ALIGNMENT

    @classmethod
    def num_bytes(cls, num_rows: int, max_length: int) -> int:
        """Of both tables on the device."""
        return 2 * torch.int32.itemsize * math.prod(cls.shape(num_rows, max_length))

    def admit(self, newcomers: Sequence[Admission], staging: Staging) -> None:
        """Upload what is known of newcomers, and where K and V of their first tokens lie, in one copy if that is short.

        Copies are of bounded size, since prompts that are cached already may come by hundreds, each of any length.
        """
        rows = np.array([newcomer.row for newcomer in newcomers], dtype=np.int32)
        self.prompt_lengths[rows] = [len(newcomer.prompt_ids) for newcomer in newcomers]
        ids = self._beginnings(rows, [one.prompt_ids + one.generated_ids for one in newcomers])
        slots = self._beginnings(rows, [one.cached_slots for one in newcomers])
        for first in range(0, len(ids[0]), _ADMITTED_AT_ONCE):  # fewer have slots
            part = slice(first, first + _ADMITTED_AT_ONCE)
            uploaded = staging.upload(*(array[part] for array in (*ids, *slots)))
            self.tokens.view(-1).index_copy_(0, *uploaded[:2])
            if first < len(slots[0]):
                self.slots.view(-1).index_copy_(0, *uploaded[2:])

    def _beginnings(
        self, rows: NDArray[np.int32], values: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Values with which rows begin, packed: their places in a flattened table, and the values."""
        lengths = np.array([len(of_row) for of_row in values], dtype=np.int32)
        places = self.places(np.repeat(rows, lengths), _positions(np.zeros_like(rows), lengths))
        return places, np.concatenate([np.array(of_row, dtype=np.int32) for of_row in values])

    def places(self, rows: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int64]:
        """Where the positions of these rows lie in a flattened table."""
        return rows.astype(np.int64) * self.tokens.shape[1] + positions

    @property
    def padding_place(self) -> int:
        return self.padding_row * self.tokens.shape[1]


class Bucket(NamedTuple):
    """The shape of a step: how many tokens it has at most, how many of them may decode, and of how many prompts the
    others may be. What it costs goes by the tokens; room for more decodes and prompts than there are is nearly free.
    """

    tokens: int
    decodes: int
    prefills: int = 0

    @classmethod
    def of(cls, batch: Batch) -> Bucket:
        """The one that the batch fills."""
        return cls(len(batch.slots), batch.num_decodes, len(batch.rows) - batch.num_decodes)

    @property
    def samples(self) -> int:
        """How many sequences may sample a token."""
        return min(self.decodes + self.prefills, self.tokens)

    def layout(self) -> Layout:
        """Of its StepArrays."""
        t, n, m = self.tokens, self.decodes + self.prefills, self.samples
        lengths = StepArrays(t, m, m, t, t, t, n, n, self.prefills + 1)
        return Layout([(_INT64, length) for length in lengths[:3]] + [(_INT32, length) for length in lengths[3:]])


class StepArrays(NamedTuple):
    """All that a step of a bucket's shape reads, beside the tables: t tokens of n sequences, on the host or the device.

    The tokens that decode come first, then those of the prompts, then padding: tokens of the tables' padding row
    without a slot, which belong to no sequence. Of the sequences, those that prefill come behind the bucket's last
    decode; padding in either part has no context and no queries. The logits of the sequences that sample come first and
    without gaps; all others' are those of any token, and what is chosen from them goes to the padding row.
    """

    token_places: Any  # [t] int64, of each token in the flattened tables
    last_tokens: Any  # [samples] int64, whose logits are wanted
    sampled_places: Any  # [samples] int64, where in the flattened table of tokens each choice goes
    positions: Any  # [t] int32
    slots: Any  # [t] int32; -1 is padding
    rotary_lengths: Any  # [t] int32, see models.layers.StepInput
    rows: Any  # [n] int32
    context_lengths: Any  # [n] int32
    query_starts: Any  # [prefills + 1] int32, the first tokens of the prompts, and behind the last


def fill(arrays: StepArrays, batch: Batch, bucket: Bucket, tables: RequestTables) -> None:
    """Write a batch that fits the bucket into its arrays on the host, with padding where it leaves room."""
    tokens, decodes, prefills = Bucket.of(batch)
    positions = _positions(batch.starts, batch.lengths)
    context_lengths = batch.starts + batch.lengths
    rotary_lengths = np.maximum(np.repeat(tables.prompt_lengths[batch.rows], batch.lengths), positions + 1)
    token_places = tables.places(np.repeat(batch.rows, batch.lengths), positions)
    for target, values, padding in (
        (arrays.token_places, token_places, tables.padding_place),
        (arrays.positions, positions, 0),
        (arrays.slots, batch.slots, -1),
        (arrays.rotary_lengths, rotary_lengths, 0),
    ):
        target[:tokens] = values
        target[tokens:] = padding
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
    arrays.sampled_places[:num_sampled] = tables.places(batch.rows[batch.samples], context_lengths[batch.samples])
    arrays.sampled_places[num_sampled:] = tables.padding_place


def _positions(starts: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """start, start + 1, … of each sequence, packed."""
    first_index = np.cumsum(lengths) - lengths
    count = int(lengths.sum())
    return np.arange(count, dtype=np.int32) + np.repeat((starts - first_index).astype(np.int32), lengths)
