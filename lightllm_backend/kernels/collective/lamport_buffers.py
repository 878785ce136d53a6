# SPDX-License-Identifier: Apache-2.0
"""Low-latency (Lamport) buffers, through which tensor-parallel ranks send each other rows of numbers.

Each rank owns a buffer [2, ranks, rows, columns] that all ranks of the group map. To send row i, a rank writes it to
[turn, its own rank, i] of the receiver's buffer. The receiver polls that place until no number in it is EMPTY, then
makes it EMPTY again. The numbers are their own arrival flags, so a message costs one write: no flag, fence or barrier.

Rows are independent. Each row alternates between its two places, one kernel per turn. Reusing a place is safe: a rank
sends row i a third time only after it has received every rank's second message (or a sum that contains it). Each rank
sent its second message from a kernel that started after the kernel that read and cleared the first had ended.

Each rank counts the turns on its own device, per row. All ranks start at 0 and run the same kernels, so they agree, and
captured graphs and steps of any shape may follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# EMPTY: the bits of a number that has not arrived; as a number they are a NaN. A sender replaces this NaN by another.
EMPTY, SENT_FOR_EMPTY = -1, -2
# Two shots take two trips instead of one; they pay off once they save a rank this many bytes of what it sends
# (perf/all_reduce.py times both).
MIN_BYTES_SAVED_BY_TWO_SHOTS = 640 << 10


class LamportBuffers(NamedTuple):
    """The buffers of all ranks, as one rank sees them."""

    by_rank: Sequence[Tensor]  # each [2, ranks, rows, columns] int16 or int32, the bits of numbers
    addresses: Tensor  # [ranks] int64 on the device: the address of each buffer
    turns: Tensor  # [rows] int32 on the device: the place, 0 or 1, of a row's next message
    rank: int

    @classmethod
    def of(cls, by_rank: Sequence[Tensor], rank: int) -> LamportBuffers:
        """Wrap buffers that hold nothing but EMPTY."""
        own = by_rank[rank]
        addresses = torch.tensor([buffer.data_ptr() for buffer in by_rank], dtype=torch.int64, device=own.device)
        return cls(by_rank, addresses, torch.zeros(own.shape[2], dtype=torch.int32, device=own.device), rank)

    def fit(self, rows: int, columns: int) -> bool:
        """Whether a message of this shape fits."""
        return rows <= self.turns.shape[0] and columns == self.by_rank[0].shape[3]

    def fit_in_pieces(self, rows: int, columns: int) -> bool:
        """Whether a message fits whose rows travel in pieces."""
        return rows * self.pieces(columns) <= self.turns.shape[0]

    def pieces(self, columns: int) -> int:
        """The rows of a buffer that hold a row of so many columns."""
        return -(-columns // self.by_rank[0].shape[3])

    def use_two_shots(self, rows: int) -> bool:
        """Whether the rows' owners sum a message of this many rows; if not, every rank sums all of it."""
        _, ranks, _, columns = self.by_rank[0].shape
        others, owned = ranks - 1, rows / ranks
        saved_rows = others * rows - 2 * others * owned
        return saved_rows * columns * self.by_rank[0].itemsize > MIN_BYTES_SAVED_BY_TWO_SHOTS


def bits_type_of(dtype: torch.dtype) -> torch.dtype:
    """The integer type in which a buffer holds the bits of this type."""
    return {2: torch.int16, 4: torch.int32}[dtype.itemsize]
