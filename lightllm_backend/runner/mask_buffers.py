# SPDX-License-Identifier: Apache-2.0
"""MaskBuffers: token masks on their way to the device.

The host makes a step's masks while the device runs the step's forward, so the copy has a stream of its own: on the
forward's stream it would wait for the forward.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FIRST_WORDS = 1 << 16
# A buffer's turn comes again when the results of all but the last two steps have been read on rank 0. So the kernels
# that read it have ended, on the other ranks too: they come before the sums of a step that rank 0 has finished.
_BUFFERS = 3
_ALIGNMENT = 4  # words, see staging.py


class _Buffer:
    """Words in pinned memory and on the device."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self.host = torch.empty(num_words, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.array: NDArray[np.int32] = self.host.numpy()
        self.device = torch.empty_like(self.host, device=device) if device.type == "cuda" else self.host
        self.copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]


class MaskBuffers:
    """A ring of buffers for the masks of a step, one bit a token, and for which sequence has which, in one copy.

    It takes no memory before the first mask. On a CPU there is nothing to copy: the masks are where they were made.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.words = -(-vocab_size // 32)  # of a mask
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[_Buffer] = []
        self._turn = 0
        self._count = self._sequences = 0  # what was taken last

    def take(self, count: int, sequences: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return masks [count, words] and mask_rows [sequences] to write. They hold those of an earlier step."""
        self._count, self._sequences = count, sequences
        self._make_room(self._end)
        self._turn = (self._turn + 1) % _BUFFERS
        array = self._buffers[self._turn].array
        return array[self._first_mask : self._end].reshape(count, self.words), array[:sequences]

    def send(self) -> tuple[Tensor, Tensor]:
        """Copy what was taken last to the device, for the kernels launched next on the current stream."""
        buffer = self._buffers[self._turn]
        if self._stream is not None and buffer.copied is not None:
            with torch.cuda.stream(self._stream):
                buffer.device[: self._end].copy_(buffer.host[: self._end], non_blocking=True)
                buffer.copied.record()
            torch.cuda.current_stream().wait_event(buffer.copied)
        masks = buffer.device[self._first_mask : self._end].view(self._count, self.words)
        return masks, buffer.device[: self._sequences]

    @property
    def _first_mask(self) -> int:
        """Where the masks begin behind the mask_rows."""
        return -(-self._sequences // _ALIGNMENT) * _ALIGNMENT

    @property
    def _end(self) -> int:
        return self._first_mask + self._count * self.words

    def _make_room(self, num_words: int) -> None:
        if self._buffers and len(self._buffers[0].array) >= num_words:
            return
        if self._stream is not None:
            torch.cuda.synchronize(self._device)  # before the buffers in use are freed; this happens a few times
        size = max(_FIRST_WORDS, 1 << (num_words - 1).bit_length())
        self._buffers = [_Buffer(size, self._device) for _ in range(_BUFFERS)]
