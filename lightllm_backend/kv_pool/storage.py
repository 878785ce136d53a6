# SPDX-License-Identifier: Apache-2.0
"""The K and V tensors of the pool. Which slots are free is allocator.py's fact; here is only what lies in them."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16


class KVStorage:
    """K and V of every layer, allocated once: per layer two tensors `[slots, kv_heads, head_dim]`.

    A token's K and V of one head lie side by side, since they are read together and a longer row is read sooner.
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
        pairs = (num_slots, num_kv_heads, 2)

        def layer() -> tuple[Tensor, Tensor, Tensor | None]:
            k, v = torch.empty((*pairs, head_dim), dtype=dtype, device=device).unbind(2)
            return k, v, torch.empty(pairs, dtype=SCALE_DTYPE, device=device) if dtype == torch.int8 else None

        # Of each layer: K, V, the scales of both.
        self.layers = [layer() for _ in range(num_layers)]
        self.num_bytes = num_slots * self.slot_bytes(num_layers, num_kv_heads, head_dim, dtype)

    @staticmethod
    def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Memory that one token slot takes over all layers, in bytes."""
        scale_bytes = SCALE_DTYPE.itemsize if dtype == torch.int8 else 0
        return 2 * num_layers * num_kv_heads * (head_dim * dtype.itemsize + scale_bytes)
