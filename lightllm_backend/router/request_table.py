# SPDX-License-Identifier: Apache-2.0
"""What the Router knows of the sequences that hold token slots: an array a fact, indexed by request-table row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.router.sequence import Sequence

NEVER = np.iinfo(np.int32).max


class RequestTable:
    """The rows, who has them, and which token slots each sequence holds.

    Everything is as planned, not as known: a token counts as cached from when the batch that caches it is made.
    """

    def __init__(self, num_rows: int) -> None:
        self.owners: NDArray[Any] = np.full(num_rows, None, dtype=object)  # the Sequence; None: the row is free
        self.cached = np.zeros(num_rows, dtype=np.int32)  # tokens with a slot
        self.remaining = np.zeros(num_rows, dtype=np.int32)  # decode steps still to be planned
        self.decoding = np.zeros(num_rows, dtype=np.bool_)  # the whole prompt is planned
        self.eos_from = np.zeros(num_rows, dtype=np.int32)  # an EOS ends the sequence once so many tokens are cached
        # Wide enough for the longest sequence so far. Untouched pages cost no memory.
        self._slots: NDArray[np.int32] = np.empty((num_rows, 256), dtype=np.int32)
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def take_row(self, sequence: Sequence) -> int:
        """Gives the sequence a row."""
        row = self._free_rows.pop()
        sampling = sequence.request.sampling
        self.owners[row] = sequence
        self.cached[row] = 0
        self.remaining[row] = sampling.max_tokens - 1
        self.decoding[row] = False
        # An EOS may be generated token min_tokens + 1 at the earliest; prompt_length tokens are cached at token 1.
        self.eos_from[row] = NEVER if sampling.ignore_eos else sequence.prompt_length + sampling.min_tokens
        self._widen(sequence.max_slots)
        sequence.row = row
        return row

    def release_row(self, sequence: Sequence) -> NDArray[np.int32]:
        """Takes the sequence's row back and returns the token slots that it held."""
        row = sequence.row
        assert row is not None, "the sequence holds no row"
        assert self.owners[row] is sequence, "the row is another sequence's"
        sequence.row = None
        self.owners[row] = None
        self.decoding[row] = False
        self._free_rows.append(row)
        return self._slots[row, : self.cached[row]]

    def decode_rows(self) -> NDArray[np.int32]:
        """The rows that can decode a token in this step, ascending."""
        return np.flatnonzero(self.decoding).astype(np.int32)

    def planned_out_rows(self) -> NDArray[np.int64]:
        """The rows whose last step is planned."""
        return np.flatnonzero(self.decoding & (self.remaining == 0))

    def append_decodes(self, rows: NDArray[np.int32], slots: NDArray[np.int32]) -> NDArray[np.int32]:
        """Plans a decode step of each row: one slot each. Returns the tokens that were cached before."""
        starts = self.cached[rows]
        self._slots[rows, starts] = slots
        self.cached[rows] = starts + 1
        self.remaining[rows] -= 1
        return starts

    def append_chunk(self, row: int, slots: NDArray[np.int32]) -> None:
        """Plans the next chunk of a prompt."""
        start = self.cached[row]
        self._slots[row, start : start + len(slots)] = slots
        self.cached[row] = start + len(slots)

    def held_slots(self) -> NDArray[np.int32]:
        """The slots of all rows, in one array."""
        held = [self._slots[row, : self.cached[row]] for row, owner in enumerate(self.owners) if owner is not None]
        return np.concatenate([np.empty(0, dtype=np.int32), *held])

    def check(self) -> None:
        """Asserts that each row is either free or the row of exactly one sequence."""
        taken = [row for row, owner in enumerate(self.owners) if owner is not None]
        assert sorted(taken + self._free_rows) == list(range(len(self.owners))), "a row is lost or is there twice"
        for row in taken:
            sequence = self.owners[row]
            assert sequence.row == row, "an owner has another row"
            prefilled = min(self.cached[row], sequence.prompt_length)
            assert self.decoding[row] == (prefilled == sequence.prompt_length), "decoding before the prompt is planned"
            if self.decoding[row]:
                assert self.cached[row] + self.remaining[row] == sequence.max_slots, "steps to come are miscounted"

    def _widen(self, width: int) -> None:
        num_rows, old_width = self._slots.shape
        if width > old_width:
            wider = np.empty((num_rows, max(width, 2 * old_width)), dtype=np.int32)
            wider[:, :old_width] = self._slots
            self._slots = wider
