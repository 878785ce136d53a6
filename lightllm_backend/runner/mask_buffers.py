# SPDX-License-Identifier: Apache-2.0
"""MaskBuffers: token masks on their way to the device.

The host makes a step's masks while the device runs the step's forward, so the copy has a stream of its own: on the
forward's stream it would wait for the forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FIRST_MASKS = 16
_STEPS_IN_FLIGHT = 2


class _Buffer:
    """Masks in pinned memory and on the device."""

    def __init__(self, count: int, words: int, device: torch.device) -> None:
        self.host = torch.empty(count, words, dtype=torch.int32, pin_memory=True)
        self.device = torch.empty(count, words, dtype=torch.int32, device=device)
        self.copied, self.read = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]


class MaskBuffers:
    """A ring of buffers for the masks of a step, one bit a token. It takes no memory before the first mask.

    On a CPU there is nothing to copy: the masks are where they were made.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.words = -(-vocab_size // 32)
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[_Buffer] = []
        self._turn = 0
        self._masks = torch.empty(0, self.words, dtype=torch.int32)

    def take(self, count: int) -> NDArray[np.int32]:
        """Return the next buffer, [count, words], to write masks into. It holds those of an earlier step."""
        if self._stream is None:
            self._masks = torch.empty(count, self.words, dtype=torch.int32)
        else:
            self._make_room(count)
            self._turn = (self._turn + 1) % _STEPS_IN_FLIGHT
            buffer = self._buffers[self._turn]
            buffer.copied.synchronize()
            self._masks = buffer.host[:count]
        masks: NDArray[np.int32] = self._masks.numpy()
        return masks

    @contextmanager
    def on_device(self) -> Iterator[Tensor]:
        """Copy the masks taken last to the device, for the kernels that the block launches on the current stream."""
        if self._stream is None:
            yield self._masks
            return
        buffer = self._buffers[self._turn]
        masks = buffer.device[: len(self._masks)]
        self._stream.wait_event(buffer.read)
        with torch.cuda.stream(self._stream):
            masks.copy_(self._masks, non_blocking=True)
            buffer.copied.record()
        torch.cuda.current_stream().wait_event(buffer.copied)
        yield masks
        buffer.read.record()

    def _make_room(self, count: int) -> None:
        if self._buffers and len(self._buffers[0].host) >= count:
            return
        torch.cuda.synchronize(self._device)  # before the buffers in use are freed; this happens a few times at most
        size = max(_FIRST_MASKS, 1 << (count - 1).bit_length())
        self._buffers = [_Buffer(size, self.words, self._device) for _ in range(_STEPS_IN_FLIGHT)]
