# SPDX-License-Identifier: Apache-2.0
"""TokenMasks: which rows have a token mask, and the masks of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.request import SamplingParams
from lightllm_backend.runner.mask_buffers import MaskBuffers
from lightllm_backend.runner.stream_gate import StreamGate

_NO_MASK = -1


class TokenMasks:
    """Makes the masks of `allowed_token_ids` itself; those of structured output come from rank 0 in every step."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device, with_gate: bool) -> None:
        """with_gate: see ModelRunner."""
        self._buffers = MaskBuffers(vocab_size, device, with_gate)
        self._structured = np.zeros(num_rows, dtype=bool)  # the row's mask changes with every token
        self._constant: dict[int, NDArray[np.int32]] = {}  # by row
        self._masked = np.zeros(num_rows, dtype=bool)
        self._are_taken = False  # whether any sequence of the step has a mask

    def admit(self, rows: Sequence[int], params: Sequence[SamplingParams]) -> None:
        """Take note of what the new owners of `rows` allow."""
        for row, sampling in zip(rows, params, strict=True):
            self._masked[row] = sampling.masked
            self._structured[row] = bool(sampling.structured_output)
            self._constant.pop(row, None)
            if sampling.allowed_token_ids:
                self._constant[row] = mask_of(sampling.allowed_token_ids, self._buffers.words)

    def take(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Begin the masks of a step that samples for `rows`; return the buffer [structured rows, words] to fill."""
        self._are_taken = bool(self._masked[rows].any())
        if not self._are_taken:
            return np.empty((0, self._buffers.words), dtype=np.int32)
        structured = self._structured[rows]
        num_structured = int(structured.sum())
        constant = [index for index, row in enumerate(rows.tolist()) if row in self._constant]
        masks, mask_rows = self._buffers.take(num_structured + len(constant), len(rows))
        mask_rows[:] = _NO_MASK
        mask_rows[structured] = np.arange(num_structured)
        mask_rows[constant] = np.arange(num_structured, num_structured + len(constant))
        for place, index in enumerate(constant, num_structured):
            masks[place] = self._constant[int(rows[index])]
        return masks[:num_structured]

    @property
    def gate(self) -> StreamGate | None:
        """What steps on the device wait at for structured output's masks; None: they are launched after these."""
        return self._buffers.gate

    @property
    def gate_number(self) -> int:
        """What the gate is opened with for the step whose masks were last on the device."""
        return self._buffers.gate_number

    @contextmanager
    def on_device(self, is_gated: bool) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Provide the step's masks and mask_rows, as `Kernels.apply_token_masks` takes them; None if it has none.

        is_gated: they are there once the gate is opened.
        """
        if not self._are_taken:
            yield None
            return
        with self._buffers.on_device(is_gated) as masks:
            yield masks


def mask_of(token_ids: Sequence[int], words: int) -> NDArray[np.int32]:
    """Return the mask [words] that allows these tokens."""
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    mask: NDArray[np.int32] = np.packbits(bits, bitorder="little").view(np.int32)
    return mask
