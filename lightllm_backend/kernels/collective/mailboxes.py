# SPDX-License-Identifier: Apache-2.0
"""How tensor-parallel ranks send each other rows of their products: memory that senders write and the owner reads.

A rank has a mailbox [2, ranks, rows, columns] that all ranks of the group map. What it sends of row i, it writes to
[turn, its rank, i] of the receiver's, who waits until it is there. A number that has not arrived is EMPTY: the numbers
are their own signals, so no flag, fence or barrier stands between sender and receiver, and a message takes the time of
one write. The receiver makes what it has read EMPTY again.

Rows do not depend on each other, and each takes turns between its two places, one kernel a turn. A sender need not ask
whether a place is free. Before it sends row i for the third time, it has received what all ranks had sent of it for the
second time, or a sum in which that is; each had sent it by a kernel which started when the one that had read the first,
and had made its place EMPTY, had ended.

Whose turn it is, is counted on the device, by each rank for itself and for each row, so captured graphs and steps of
any shape may follow each other as long as all ranks run the same. Ranks agree since all started at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The bits of a number that has not arrived, which as a number are a NaN, and those that are sent instead of such a NaN.
EMPTY, SENT_FOR_EMPTY = -1, -2
# Two shots take a message's way twice, and are quicker where they save a rank this much of what it sends.
TWO_SHOTS_SAVE = 640 << 10


class Mailboxes(NamedTuple):
    """Those of all ranks, as one of them sees them."""

    boxes: Sequence[Tensor]  # in order of rank, [2, ranks, rows, columns] int16 or int32: the bits of numbers
    addresses: Tensor  # [ranks] int64, where they are, on the device
    turns: Tensor  # [rows] int32, which of its two places a row's next message takes
    rank: int

    @classmethod
    def of(cls, boxes: Sequence[Tensor], rank: int) -> Mailboxes:
        """Of boxes that are EMPTY throughout."""
        own = boxes[rank]
        addresses = torch.tensor([box.data_ptr() for box in boxes], dtype=torch.int64, device=own.device)
        return cls(boxes, addresses, torch.zeros(own.shape[2], dtype=torch.int32, device=own.device), rank)

    def take(self, rows: int, columns: int) -> bool:
        """Whether a message of this shape has room."""
        return rows <= self.turns.shape[0] and columns == self.boxes[0].shape[3]

    def take_two_shots(self, rows: int) -> bool:
        """Whether a message of so many rows is summed by the rows' owners, or by all ranks at once."""
        _, ranks, _, columns = self.boxes[0].shape
        others, owned = ranks - 1, rows / ranks
        saved_rows = others * rows - 2 * others * owned
        return saved_rows * columns * self.boxes[0].itemsize > TWO_SHOTS_SAVE


def bits_of(dtype: torch.dtype) -> torch.dtype:
    """The type of a mailbox for numbers of this type."""
    return {2: torch.int16, 4: torch.int32}[dtype.itemsize]
