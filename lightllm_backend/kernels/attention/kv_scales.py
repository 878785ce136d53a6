# SPDX-License-Identifier: Apache-2.0
"""Scales of an int8 pool: their range, and the form in which launchers pass them.

They are float16 [slots, kv_heads, 2], K's and V's adjacent, so that kernels read both as one 32-bit number.
"""

import torch
from torch import Tensor

# The normal numbers of float16.
MIN_KV_SCALE, MAX_KV_SCALE = 2.0**-14, 65504.0


def scale_pairs(k_pool: Tensor, scales: Tensor | None) -> tuple[Tensor, bool]:
    """The scales as pairs [slots, kv_heads] int32, and whether the pool is int8; if not, any tensor in their place."""
    if scales is None:
        assert k_pool.dtype != torch.int8
        return k_pool, False
    assert k_pool.dtype == torch.int8
    assert scales.dtype == torch.float16
    assert scales.stride(2) == 1
    return scales.view(torch.int32).squeeze(2), True
