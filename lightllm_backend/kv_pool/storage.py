# SPDX-License-Identifier: Apache-2.0
"""The K and V tensors of the pool. Which slots are free is allocator.py's fact; here is only what lies in them."""

from __future__ import annotations

import torch
from torch import Tensor


class KVStorage:
    """K and V of every layer, allocated once: per layer two tensors `[slots, kv_heads, head_dim]`."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_slots, num_kv_heads, head_dim)
        self.layers: list[tuple[Tensor, Tensor]] = [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(num_layers)
        ]
        self.num_bytes = num_slots * self.slot_bytes(num_layers, num_kv_heads, head_dim, dtype)

    @staticmethod
    def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Memory that one token slot takes over all layers, in bytes."""
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
