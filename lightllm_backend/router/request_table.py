# SPDX-License-Identifier: Apache-2.0
"""RequestTable: the Router's facts about sequences with token slots, one array per fact, indexed by row."""

from __future__ import annotations

from collections.abc import Sequence as Sequential
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightllm_backend.kv_pool.layer_groups import ONE_GROUP, LayerGroups
from lightllm_backend.request import MAX_STOP_TOKEN_IDS
from lightllm_backend.router.admission import Demand
from lightllm_backend.router.sequence import Sequence

NO_TOKEN = -1


class RequestTable:
    """Assigns rows to sequences and records the tokens and token slots of each.

    The table shows what is planned, not what has run: a token counts as cached once a batch that caches it is made.
    """

    def __init__(
        self, num_rows: int, num_draws: int = 1, eos_ids: Sequential[int] = (), groups: LayerGroups = ONE_GROUP
    ) -> None:
        self.groups = groups
        self._eos_ids = tuple(eos_ids)
        self.owners: NDArray[Any] = np.full(num_rows, None, dtype=object)  # a Sequence, or None if the row is free
        self.handles = np.zeros(num_rows, dtype=np.int64)  # names of the sequences in a RouterOutput
        self.with_log_probs = np.zeros(num_rows, dtype=np.bool_)
        self.structured = np.zeros(num_rows, dtype=np.bool_)  # the text follows a matcher
        self.arrival_indices = np.zeros(num_rows, dtype=np.int64)
        self.quantiles = np.zeros((num_rows, num_draws))  # drawn by the admission policy
        self.prompt_lengths = np.zeros(num_rows, dtype=np.int32)
        self.max_tokens = np.zeros(num_rows, dtype=np.int64)
        self.cached = np.zeros(num_rows, dtype=np.int32)  # tokens with a slot; 0 in a free row
        self.given_back = np.zeros(num_rows, dtype=np.int32)  # the first so many have none in the groups with a window
        self.remaining = np.zeros(num_rows, dtype=np.int64)  # decode steps not planned yet
        self.decoding = np.zeros(num_rows, dtype=np.bool_)  # all tokens that were known on admission are planned
        self.ignores_eos = np.zeros(num_rows, dtype=np.bool_)
        # The number of cached tokens from which on an ending id ends the sequence.
        self.may_end_from = np.zeros(num_rows, dtype=np.int32)
        self.num_ending_ids = np.zeros(num_rows, dtype=np.int32)
        self.ending_ids = np.full((num_rows, len(self._eos_ids) + MAX_STOP_TOKEN_IDS), NO_TOKEN, dtype=np.int32)
        self.num_known = np.zeros(num_rows, dtype=np.int32)  # tokens in `_token_ids`
        # As wide as the longest sequence so far. Pages that nothing was written to take no memory.
        self._slots: list[NDArray[np.int32]] = [
            np.empty((num_rows, 256), dtype=np.int32) for _ in range(self.groups.count)
        ]
        self._token_ids = np.empty_like(self._slots[0])  # prompt and generated
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def take_row(self, sequence: Sequence, prefix_slots: NDArray[np.int32]) -> int:
        """Give the sequence a row, with the slots of its cached prefix."""
        self._widen(sequence.max_slots + 1)
        row = self._free_rows.pop()
        sampling = sequence.request.sampling
        self.owners[row] = sequence
        self.handles[row] = sequence.handle
        self.with_log_probs[row] = sampling.return_log_probs
        self.structured[row] = sequence.matcher is not None
        self.arrival_indices[row] = sequence.arrival_index
        self.quantiles[row] = sequence.quantiles
        self.prompt_lengths[row] = sequence.prompt_length
        self.max_tokens[row] = sampling.max_sampled
        self.cached[row] = len(prefix_slots)
        self.given_back[row] = 0
        self.remaining[row] = sampling.max_sampled - sequence.num_generated - 1
        self.decoding[row] = False
        self.ignores_eos[row] = sampling.ignore_eos
        # EOS may end the sequence from generated token min_tokens + 1 on; at token 1, prompt_length tokens are cached.
        self.may_end_from[row] = sequence.prompt_length + sampling.min_tokens
        ending_ids = sampling.ending_ids(self._eos_ids)
        self.num_ending_ids[row] = len(ending_ids)
        self.ending_ids[row] = NO_TOKEN
        self.ending_ids[row, : len(ending_ids)] = ending_ids
        self.num_known[row] = sequence.known_length
        self._token_ids[row, : sequence.known_length] = sequence.known_ids
        self._slots[0][row, : len(prefix_slots)] = prefix_slots  # only one group shares prefixes
        sequence.row = row
        return row

    def release_row(self, sequence: Sequence) -> None:
        """Take the sequence's row back."""
        row = sequence.row
        assert row is not None, "the sequence holds no row"
        assert self.owners[row] is sequence, "the row is another sequence's"
        sequence.row = None
        self.owners[row] = None
        self.decoding[row] = False
        self.cached[row] = 0
        self._free_rows.append(row)

    def decode_rows(self) -> NDArray[np.int64]:
        """The rows that decode a token in this step, ascending."""
        rows: NDArray[np.int64] = self.decoding.nonzero()[0]
        return rows

    def decode_rows_longest_first(self) -> NDArray[np.int64]:
        """The same rows, longest context first: a long context that started last would keep the GPU waiting."""
        rows = self.decode_rows()
        ordered: NDArray[np.int64] = rows[np.argsort(-self.cached[rows])]
        return ordered

    def planned_out_rows(self) -> NDArray[np.int64]:
        """The rows whose last step is planned."""
        rows: NDArray[np.int64] = (self.decoding & (self.remaining == 0)).nonzero()[0]
        return rows

    def append_decodes(self, rows: NDArray[np.int64], slots: NDArray[np.int32]) -> NDArray[np.int32]:
        """Plan one decode of each row, with slots [groups, rows]. Return the numbers of tokens cached before."""
        starts = self.cached[rows]
        for table, of_group in zip(self._slots, slots, strict=True):
            table[rows, starts] = of_group
        self.cached[rows] = starts + 1
        self.remaining[rows] -= 1
        return starts

    def append_chunk(self, row: int, slots: NDArray[np.int32]) -> None:
        """Plan the next chunk of a prompt, with slots [groups, tokens]."""
        start, end = self.cached[row], self.cached[row] + slots.shape[1]
        for table, of_group in zip(self._slots, slots, strict=True):
            table[row, start:end] = of_group
        self.cached[row] = end

    def give_back(self) -> NDArray[np.int32]:
        """Take from all rows, and return, the slots that no query of a step to come sees in groups with a window.

        The next query of a row stands behind its cached tokens. A step that is in flight may still read the slots.
        """
        gone = np.maximum(self.cached - (self.groups.window - 1), 0)
        counts = gone - self.given_back
        rows = (counts > 0).nonzero()[0]
        counts = counts[rows]
        # The positions of each row, packed.
        firsts = np.repeat(self.given_back[rows] - (np.cumsum(counts) - counts), counts)
        places = np.repeat(rows, counts), firsts + np.arange(len(firsts))
        self.given_back[rows] = gone[rows]
        slots = [table[places] for table in self._slots[self.groups.num_full :]]
        return np.concatenate([np.empty(0, dtype=np.int32), *slots])

    def record(self, rows: NDArray[np.int64], positions: NDArray[np.int32], token_ids: NDArray[np.int32]) -> None:
        """Store sampled token ids."""
        self._token_ids[rows, positions] = token_ids
        self.num_known[rows] = positions + 1

    def num_generated(self, row: int) -> int:
        """Generated tokens whose ids are known."""
        return int(self.num_known[row] - self.prompt_lengths[row])

    def num_sampled(self, row: int) -> int:
        """Tokens that the sequence will have generated when all planned steps are done."""
        return int(self.max_tokens[row] - self.remaining[row]) if self.decoding[row] else self.num_generated(row)

    def known_token_ids(self, row: int) -> NDArray[np.int32]:
        return self._token_ids[row, : self.num_known[row]]

    def slots_of(self, row: int) -> NDArray[np.int32]:
        """All slots that the row holds: of one group in the order of its tokens, then of the next."""
        cached, given_back = self.cached[row], self.given_back[row]
        if self.groups.count == 1:
            return self._slots[0][row, given_back:cached]
        firsts = [0] * self.groups.num_full + [given_back] * self.groups.num_windowed
        return np.concatenate([table[row, first:cached] for table, first in zip(self._slots, firsts, strict=True)])

    def demand(self, shared: NDArray[np.int64]) -> Demand:
        """The demand of the sequences that decode, without their `shared` slots [rows], which other rows hold too."""
        rows = self.decode_rows()
        remaining, max_tokens = self.remaining[rows], self.max_tokens[rows]
        num_generated = np.where(self.ignores_eos[rows], max_tokens - 1, max_tokens - remaining)
        held = self.cached[rows] - shared[rows]
        return Demand(held, remaining, num_generated, max_tokens, self.quantiles[rows], np.zeros_like(remaining))

    def newest(self, tenant: str | None = None) -> Sequence:
        """The decoding sequence that arrived last; of this tenant, if there is one."""
        rows = self.decode_rows()
        if tenant is not None:
            rows = rows[[owner.request.tenant == tenant for owner in self.owners[rows]]]
        newest: Sequence = self.owners[rows[np.argmax(self.arrival_indices[rows])]]
        return newest

    def check(self) -> None:
        """Assert that each row is free or has exactly one owner. For tests."""
        taken = [row for row, owner in enumerate(self.owners) if owner is not None]
        assert sorted(taken + self._free_rows) == list(range(len(self.owners))), "a row is lost or is there twice"
        for row in taken:
            sequence = self.owners[row]
            assert sequence.row == row, "an owner has another row"
            prefilled = min(self.cached[row], sequence.known_length)
            assert self.decoding[row] == (prefilled == sequence.known_length), "decoding before the prompt is planned"
            assert self.num_known[row] >= sequence.known_length, "a token is lost"
            if self.decoding[row]:
                assert self.cached[row] + self.remaining[row] == sequence.max_slots, "steps to come are miscounted"

    def _widen(self, width: int) -> None:
        old_width = self._token_ids.shape[1]
        if width > old_width:
            new_width = max(width, 2 * old_width)
            self._slots = [_widened(table, self.cached, new_width) for table in self._slots]
            self._token_ids = _widened(self._token_ids, self.num_known, new_width)


def _widened(narrow: NDArray[np.int32], lengths: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """A wider copy. It copies only the used part of each row, so that the rest takes no memory."""
    wide = np.empty((len(narrow), width), dtype=np.int32)
    for row, length in enumerate(lengths.tolist()):
        wide[row, :length] = narrow[row, :length]
    return wide
