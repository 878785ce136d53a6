# SPDX-License-Identifier: Apache-2.0
"""DeviceTables: the token ids and token slots of all running sequences, on the device, indexed by row.

Steps overlap because of them: step N writes its sampled tokens into the table on the device and step N + 1 reads them
there, so the host can plan step N + 1 without knowing them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lightllm_backend.router.batch import Admission
from lightllm_backend.runner.staging import Staging

# Entries; 64 bytes.
_ROW_ALIGNMENT = 16
# Tokens per upload of admitted sequences, which bounds the size of the host buffers.
_ADMITTED_AT_ONCE = 1 << 15


class DeviceTables:
    """Two tables: `token_ids[row, position]`, prompt and generated, and `slots[group, row, position]`, of K and V.

    Each row has room for the longest sequence: with a shared prefix, many long sequences can run at once. In a group of
    layers with a window, slots of positions that no query sees any more may be another row's.
    """

    def __init__(self, num_rows: int, max_length: int, device: torch.device, num_groups: int = 1) -> None:
        self.padding_row = num_rows  # belongs to no request
        shape = self.shape(num_rows, max_length)
        self.token_ids = torch.zeros(shape, dtype=torch.int32, device=device)
        self.slots = torch.zeros((num_groups, *shape), dtype=torch.int32, device=device)
        self.num_groups = num_groups
        self.prompt_lengths = np.zeros(num_rows, dtype=np.int32)
        # The length of the sequence by which the first tokens are rotated; later ones have a length each.
        self.rotary_lengths = np.zeros(num_rows, dtype=np.int32)

    @staticmethod
    def shape(num_rows: int, max_length: int) -> tuple[int, int]:
        """The shape of each table. Rows are aligned, so that kernels are compiled and read alike for every length."""
        return num_rows + 1, -(-max_length // _ROW_ALIGNMENT) * _ROW_ALIGNMENT

    @classmethod
    def num_bytes(cls, num_rows: int, max_length: int, num_groups: int = 1) -> int:
        """The bytes of both tables on the device."""
        return (1 + num_groups) * torch.int32.itemsize * math.prod(cls.shape(num_rows, max_length))

    def admit(self, admissions: Sequence[Admission], staging: Staging) -> None:
        """Upload the known token ids of admitted sequences and the slots of their cached tokens.

        One copy takes them all if they are few. Copies have a bounded size, since hundreds of cached prompts of any
        length may be admitted in one step.
        """
        rows = np.array([admission.row for admission in admissions], dtype=np.int32)
        self.prompt_lengths[rows] = [len(admission.prompt_ids) for admission in admissions]
        self.rotary_lengths[rows] = [
            len(one.prompt_ids) + (len(one.generated_ids) if one.is_recomputed else 0) for one in admissions
        ]
        ids = self._beginnings(rows, [one.prompt_ids + one.generated_ids for one in admissions])
        slots = self._beginnings(rows, [one.cached_slots for one in admissions])
        for first in range(0, len(ids[0]), _ADMITTED_AT_ONCE):  # fewer have slots
            part = slice(first, first + _ADMITTED_AT_ONCE)
            uploaded = staging.upload(*(array[part] for array in (*ids, *slots)))
            self.token_ids.view(-1).index_copy_(0, *uploaded[:2])
            if first < len(slots[0]):
                self.slots[0].view(-1).index_copy_(0, *uploaded[2:])  # only one group shares prefixes

    def _beginnings(
        self, rows: NDArray[np.int32], values: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The packed values at the beginning of rows: their indices in a flattened table, and the values."""
        lengths = np.array([len(of_row) for of_row in values], dtype=np.int32)
        indices = self.flat_indices(np.repeat(rows, lengths), packed_positions(np.zeros_like(rows), lengths))
        return indices, np.concatenate([np.array(of_row, dtype=np.int32) for of_row in values])

    def flat_indices(self, rows: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int64]:
        """The indices of these positions in a flattened table."""
        return rows.astype(np.int64) * self.token_ids.shape[1] + positions

    @property
    def padding_index(self) -> int:
        return self.padding_row * self.token_ids.shape[1]


def packed_positions(starts: NDArray[np.int32], lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """start, start + 1, …, start + length - 1 of each sequence, packed."""
    first_index = np.cumsum(lengths) - lengths
    count = int(lengths.sum())
    return np.arange(count, dtype=np.int32) + np.repeat((starts - first_index).astype(np.int32), lengths)
