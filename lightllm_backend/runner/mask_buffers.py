# SPDX-License-Identifier: Apache-2.0
"""MaskBuffers: token masks on their way to the device.

The host makes a step's masks while the device runs the step's forward, so the copy has a stream of its own: on the
forward's stream it would wait for the forward. Where the driver has gates (stream_gate.py), the copy and all that reads
the masks are launched before they are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.runner.stream_gate import StreamGate

_FIRST_WORDS = 1 << 16
_STEPS_IN_FLIGHT = 2
_ALIGNMENT = 4  # words, see staging.py


class _Buffer:
    """Words in pinned memory and on the device."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self.host = torch.empty(num_words, dtype=torch.int32, pin_memory=True)
        self.device = torch.empty(num_words, dtype=torch.int32, device=device)
        self.copied, self.read = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]


class MaskBuffers:
    """A ring of buffers for the masks of a step, one bit a token, and for which sequence has which, in one copy.

    It takes no memory before the first mask. On a CPU there is nothing to copy: the masks are where they were made.
    """

    def __init__(self, vocab_size: int, device: torch.device, with_gate: bool) -> None:
        """with_gate: see ModelRunner."""
        self.words = -(-vocab_size // 32)  # of a mask
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.gate = StreamGate.where_possible(device) if with_gate else None
        self._buffers: list[_Buffer] = []
        self._turn = 0
        self._memory = torch.empty(0, dtype=torch.int32)  # of the masks taken last
        self._count = self._sequences = 0
        self.gate_number = 0  # of the masks taken last

    def take(self, count: int, sequences: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return masks [count, words] and mask_rows [sequences] to write. They hold those of an earlier step."""
        self._count, self._sequences = count, sequences
        num_words = self._first_mask + count * self.words
        if self._stream is None:
            self._memory = torch.empty(num_words, dtype=torch.int32)
        else:
            self._make_room(num_words)
            self._turn = (self._turn + 1) % _STEPS_IN_FLIGHT
            buffer = self._buffers[self._turn]
            buffer.copied.synchronize()
            self._memory = buffer.host[:num_words]
        masks, mask_rows = self._parts(self._memory)
        return masks.numpy(), mask_rows.numpy()

    @contextmanager
    def on_device(self, is_gated: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Copy what was taken last to the device, for the kernels that the block launches on the current stream.

        is_gated: the copy waits until the gate is opened.
        """
        if self._stream is None:
            yield self._parts(self._memory)
            return
        buffer = self._buffers[self._turn]
        words = buffer.device[: len(self._memory)]
        self._stream.wait_event(buffer.read)
        if is_gated:
            assert self.gate is not None
            self.gate_number = self.gate.close(self._stream)
        with torch.cuda.stream(self._stream):
            words.copy_(self._memory, non_blocking=True)
            buffer.copied.record()
        torch.cuda.current_stream().wait_event(buffer.copied)
        yield self._parts(words)
        buffer.read.record()

    @property
    def _first_mask(self) -> int:
        """Where the masks begin behind the mask_rows."""
        return -(-self._sequences // _ALIGNMENT) * _ALIGNMENT

    def _parts(self, words: Tensor) -> tuple[Tensor, Tensor]:
        return words[self._first_mask :].view(self._count, self.words), words[: self._sequences]

    def _make_room(self, num_words: int) -> None:
        if self._buffers and len(self._buffers[0].host) >= num_words:
            return
        torch.cuda.synchronize(self._device)  # before the buffers in use are freed; this happens a few times at most
        size = max(_FIRST_WORDS, 1 << (num_words - 1).bit_length())
        self._buffers = [_Buffer(size, self._device) for _ in range(_STEPS_IN_FLIGHT)]
