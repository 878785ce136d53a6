# SPDX-License-Identifier: Apache-2.0
"""Host memory that a GPU copies from on its own, so that nobody waits for the copy: pinned once, then used in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Where each array of a packed buffer begins. Kernels are compiled anew for pointers that are aligned otherwise.
_ALIGNMENT = 16

# Copies that may be on their way before one is waited for: a few for each step in flight.
_UPLOADS_IN_FLIGHT = 8
# Of each buffer; enough for thousands of tokens a step. It grows when a step needs more.
_FIRST_BYTES = 1 << 18

_TORCH_TYPES = {np.dtype(name): getattr(torch, name) for name in ("int32", "int64", "float32")}


class Layout:
    """Where the arrays of some types and lengths lie in one buffer of bytes."""

    def __init__(self, parts: Sequence[tuple[np.dtype[Any], int]]) -> None:
        self._slices: list[tuple[slice, np.dtype[Any], torch.dtype]] = []
        start = 0
        for dtype, length in parts:
            end = start + dtype.itemsize * length
            self._slices.append((slice(start, end), dtype, _TORCH_TYPES[dtype]))
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = start

    def arrays(self, buffer: NDArray[np.uint8]) -> list[NDArray[Any]]:
        return [buffer[part].view(dtype) for part, dtype, _ in self._slices]

    def tensors(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[part].view(dtype) for part, _, dtype in self._slices]


class HostBuffer:
    """Memory to write arrays into, and to copy to the device then. Where the CPU computes, it is the tensor itself."""

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
        """Its parts, to be written."""
        return layout.arrays(self._array)

    def send(self, num_bytes: int, target: Tensor | None = None) -> Tensor:
        """The first bytes on the device, in `target` if that is given; the copy may still be on its way."""
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
        """Until it may be written again."""
        if self._copied:
            self._copied.synchronize()


class Staging:
    """Owns the buffers through which a runner's arrays reach the device, and uses them in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turn = 0
        self._buffers: list[HostBuffer] = []
        if device.type == "cuda":
            self._make_buffers(_FIRST_BYTES)

    def upload(self, *arrays: NDArray[Any]) -> list[Tensor]:
        """The arrays on the device, in one asynchronous copy."""
        layout = Layout([(array.dtype, len(array)) for array in arrays])
        buffer = self.buffer(layout.num_bytes)
        for target, array in zip(buffer.arrays(layout), arrays, strict=True):
            target[:] = array
        return layout.tensors(buffer.send(layout.num_bytes))

    def buffer(self, num_bytes: int) -> HostBuffer:
        """Memory of at least so many bytes; to be filled and sent before a few more are asked for."""
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
