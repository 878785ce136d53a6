# SPDX-License-Identifier: Apache-2.0
"""What the scales of an int8 pool may be, and how launchers take them. They are float16, [slots, kv_heads]."""

import torch
from torch import Tensor

# The normal numbers of float16.
MIN_KV_SCALE, MAX_KV_SCALE = 2.0**-14, 65504.0


def scale_arguments(k_pool: Tensor, k_scales: Tensor | None, v_scales: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """The scales of K and V, and whether the pool is int8; where it is not, any tensor stands for them."""
    if k_scales is None or v_scales is None:
        assert k_scales is v_scales
        assert k_pool.dtype != torch.int8
        return k_pool, k_pool, False
    assert k_pool.dtype == torch.int8
    assert k_scales.stride(1) == v_scales.stride(1) == 1
    return k_scales, v_scales, True
