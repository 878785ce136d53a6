# SPDX-License-Identifier: Apache-2.0
"""KVStorage: the K and V tensors of the pool. allocator.py tracks which slots are free."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SCALE_DTYPE = torch.float16


class KVStorage:
    """K and V of every layer, allocated once: per layer two tensors [slots, kv_heads, head_dim].

    K and V of one token and head lie side by side in memory: kernels read both, and longer rows are faster to read.
    With int8, one tensor of scales [slots, kv_heads, 2] per layer has a scale per token and head for K and for V.
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

        # [layers] of K, V and the scales of both
        self.layers = [layer() for _ in range(num_layers)]
        self.num_bytes = num_slots * self.slot_bytes(num_layers, num_kv_heads, head_dim, dtype)

    @torch.inference_mode()
    def poison(self, slots: NDArray[np.int32]) -> None:
        """Make K and V of these slots NaN, so that whoever reads them before they are written again shows it.

        Steps that were launched before still read what was there.
        """
        index = torch.from_numpy(slots).to(self.layers[0][0].device, torch.int64)
        for k, v, scales in self.layers:
            for tensor in (k, v) if scales is None else (scales,):
                tensor.index_fill_(0, index, torch.nan)

    @staticmethod
    def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """The bytes of one token slot in all layers."""
        scale_bytes = SCALE_DTYPE.itemsize if dtype == torch.int8 else 0
        return 2 * num_layers * num_kv_heads * (head_dim * dtype.itemsize + scale_bytes)
