# SPDX-License-Identifier: Apache-2.0
"""StreamGate: lets a stream of the device wait for what the host has not written yet."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

_DRIVER = "libcuda.so.1"
_WAIT = "cuStreamWaitValue32_v2"  # of CUDA 11.7 and newer
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ, which counts on beyond 2**32


class StreamGate:
    """A number in pinned memory that streams wait for; the device's own front end looks at it, so nothing spins.

    What is launched on a stream behind `close` runs once the host has called `open` with the number that `close`
    returned. Gates are opened in the order in which they were closed. Launches, copies and events go on meanwhile, but
    whatever waits for the whole device waits for the host, too.
    """

    def __init__(self, device: torch.device) -> None:
        """Raise OSError, AttributeError or RuntimeError where the driver cannot do it."""
        self._wait: Any = getattr(ctypes.CDLL(_DRIVER), _WAIT)
        self._wait.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
        self._memory = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._opened = self._memory.numpy().view(np.uint32)
        self._closed = 0
        with torch.cuda.device(device):
            self._wait_on(torch.cuda.current_stream())  # it is open; this only asks the driver

    @classmethod
    def where_possible(cls, device: torch.device) -> StreamGate | None:
        """A gate, if the device is a GPU whose driver has them."""
        if device.type != "cuda":
            return None
        try:
            return cls(device)
        except (OSError, AttributeError, RuntimeError):
            return None

    def close(self, stream: torch.cuda.Stream) -> int:
        """Have the stream wait; return the number to open the gate with."""
        self._closed = (self._closed + 1) % 2**32
        self._wait_on(stream)
        return self._closed

    def open(self, number: int) -> None:
        """Let the stream go on. Any thread may call this."""
        self._opened[0] = number

    def open_all(self) -> None:
        """Let every stream go on, with whatever is there to read."""
        self.open(self._closed)

    def _wait_on(self, stream: torch.cuda.Stream) -> None:
        result = self._wait(stream.cuda_stream, self._memory.data_ptr(), self._closed, _AT_LEAST)
        if result != 0:
            raise RuntimeError(f"{_WAIT} has failed with error {result}")
