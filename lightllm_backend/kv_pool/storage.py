# SPDX-License-Identifier: Apache-2.0
"""The K and V tensors of the pool. Which slots are free is allocator.py's fact; here is only what lies in them."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16


class KVStorage:
    """K and V of every layer, allocated once: per layer two tensors `[slots, kv_heads, head_dim]`.

    Those of int8 are quantised by token and head: with both comes one tensor of scales `[slots, kv_heads, 2]`.
    """

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

        def values() -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def scales() -> Tensor | None:
            return torch.empty((*shape[:2], 2), dtype=SCALE_DTYPE, device=device) if dtype == torch.int8 else None

        # Of each layer: K, V, the scales of both.
        self.layers: list[tuple[Tensor, Tensor, Tensor | None]] = [
            (values(), values(), scales()) for _ in range(num_layers)
        ]
        self.num_bytes = num_slots * self.slot_bytes(num_layers, num_kv_heads, head_dim, dtype)

    @staticmethod
    def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Memory that one token slot takes over all layers, in bytes."""
        scale_bytes = SCALE_DTYPE.itemsize if dtype == torch.int8 else 0
        return 2 * num_layers * num_kv_heads * (head_dim * dtype.itemsize + scale_bytes)
