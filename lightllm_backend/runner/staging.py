# SPDX-License-Identifier: Apache-2.0
"""Staging: a ring of pinned host buffers for asynchronous copies to the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Bytes. Triton-lang specialises kernels on pointers aligned to 16 bytes; others would be compiled separately.
_ALIGNMENT = 16

# Buffers, hence copies in flight: a few per step, and two steps are in flight.
_UPLOADS_IN_FLIGHT = 8
# Bytes of each buffer at first: enough for thousands of tokens per step. Larger steps enlarge the buffers.
_FIRST_BYTES = 1 << 18

_TORCH_TYPES = {np.dtype(name): getattr(torch, name) for name in ("int32", "int64", "float32")}


class Layout:
    """The places of several arrays, of given types and lengths, in one buffer of bytes."""

    def __init__(self, parts: Sequence[tuple[np.dtype[Any], int]]) -> None:
        self._slices: list[tuple[slice, np.dtype[Any], torch.dtype]] = []
        start = 0
        for dtype, length in parts:
            end = start + dtype.itemsize * length
            self._slices.append((slice(start, end), dtype, _TORCH_TYPES[dtype]))
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = start

    def arrays(self, buffer: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """The arrays, as views of a buffer on the host."""
        return [buffer[part].view(dtype) for part, dtype, _ in self._slices]

    def tensors(self, buffer: Tensor) -> list[Tensor]:
        """The arrays, as views of a buffer on the device."""
        return [buffer[part].view(dtype) for part, _, dtype in self._slices]


class HostBuffer:
    """A buffer to write arrays into and then to send to the device. On a CPU, the buffer itself is what is sent."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._is_pinned = device.type == "cuda"
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        self._array: NDArray[np.uint8] = self._memory.numpy()
        self._copied = torch.cuda.Event() if self._is_pinned else None  # type: ignore[no-untyped-call]

    @property
    def num_bytes(self) -> int:
        return len(self._array)

    def arrays(self, layout: Layout) -> list[NDArray[Any]]:
        """Views of the buffer to write the arrays into."""
        return layout.arrays(self._array)

    def send(self, num_bytes: int, target: Tensor | None = None) -> Tensor:
        """Copy the first bytes to the device, into `target` if given. The copy may still be in progress."""
        source = self._memory[:num_bytes]
        if target is None:
            if not self._is_pinned:
                return source
            target = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        target.copy_(source, non_blocking=True)
        if self._copied:
            self._copied.record()
        return target

    def wait(self) -> None:
        """Wait until the last copy is done and the buffer may be overwritten."""
        if self._copied:
            self._copied.synchronize()


class Staging:
    """Owns the buffers and hands them out in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turn = 0
        self._buffers: list[HostBuffer] = []
        if device.type == "cuda":
            self._make_buffers(_FIRST_BYTES)

    def upload(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """Copy the arrays to the device, in one asynchronous copy."""
        layout = Layout([(array.dtype, len(array)) for array in arrays])
        buffer = self.buffer(layout.num_bytes)
        for target, array in zip(buffer.arrays(layout), arrays, strict=True):
            target[:] = array
        return layout.tensors(buffer.send(layout.num_bytes))

    def buffer(self, num_bytes: int) -> HostBuffer:
        """The next buffer, with at least `num_bytes` bytes. Fill and send it before the ring comes round."""
        if not self._buffers:
            return HostBuffer(num_bytes, self._device)
        if self._buffers[0].num_bytes < num_bytes:
            self._make_buffers(1 << (num_bytes - 1).bit_length())
        self._turn = (self._turn + 1) % len(self._buffers)
        self._buffers[self._turn].wait()
        return self._buffers[self._turn]

    def _make_buffers(self, num_bytes: int) -> None:
        for buffer in self._buffers:
            buffer.wait()
        self._buffers = [HostBuffer(num_bytes, self._device) for _ in range(_UPLOADS_IN_FLIGHT)]
