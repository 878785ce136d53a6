# SPDX-License-Identifier: Apache-2.0
"""Brings a weight into the order in which Hopper's kernel, quantized_prefetch, reads it."""

from lightllm_backend.kernels.hardware import GLUON_TRIED, compute_capability
from lightllm_backend.kernels.quantized.fragments import CHUNK, into_fragments
from lightllm_backend.kernels.quantized.weight import QuantizedWeight


def arrange_weight(weight: QuantizedWeight) -> QuantizedWeight:
    """Reorder the columns in place, unless the kernel cannot multiply the weight or they are in order already."""
    has_kernel = GLUON_TRIED and compute_capability(weight.values.device) == (9, 0)
    has_chunks = weight.shape[1] % CHUNK == 0 and (weight.num_groups == 1 or weight.group_size % CHUNK == 0)
    return into_fragments(weight) if has_kernel and has_chunks and not weight.in_fragments else weight
