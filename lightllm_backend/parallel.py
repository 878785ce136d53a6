# SPDX-License-Identifier: Apache-2.0
"""TensorParallel: which part of the model this process holds, and how the parts are joined.

One process per GPU. Whoever makes a TensorParallel with more than one rank has initialised torch.distributed's
default process group before; its ranks are these ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """This process's rank among `size`. With one rank every operation returns its argument."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, which may be overwritten with it."""
        if self.size > 1:
            torch.distributed.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [..., n], side by side in order of rank: [..., size * n]."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Rank `source`'s `x`, into every other rank's."""
        if self.size > 1:
            torch.distributed.broadcast(x, src=source)
        return x
