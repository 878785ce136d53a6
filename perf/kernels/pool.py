# SPDX-License-Identifier: Apache-2.0
"""A KV pool whose slots belong to sequences at random, for the attention kernels.

Their variants are "" (K and V are of the model's type), "int8", "ALiBi", BLOOM's, and "norm": Qwen3's and Gemma 3's, of
each head's query and key.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from perf.cases import WORKLOAD, read_lengths, running_contexts
from perf.kernels.measure import Arguments, Place

# As wide as the engine's own by default; its graphs do not know how long the contexts are.
TABLE_WIDTH = 3072


def mixed_contexts(sequences: int, mean: int) -> list[int]:
    """As requests are long while the workload runs."""
    contexts = running_contexts(read_lengths(WORKLOAD), sequences, np.random.default_rng(0))
    return [int(length) for length in (contexts * mean / contexts.mean()).round().clip(1)]


def pool_arguments(place: Place, contexts: Sequence[int], kv_heads: int, head_dim: int, variant: str) -> Arguments:
    """What the attention kernels take besides the queries, by name. With ALiBi there are as many heads as KV heads."""
    slots, device, is_int8 = sum(contexts), place.device, variant == "int8"
    width = max(TABLE_WIDTH, *contexts)
    # Row by row, so that a position's place in the table follows from its sequence and the lengths alone.
    live = torch.arange(width, device=device) < torch.tensor(contexts, device=device)[:, None]
    table = torch.zeros((len(contexts), width), dtype=torch.int32, device=device)
    table[live] = torch.randperm(slots, device=device, dtype=torch.int32)
    shape = (slots, kv_heads, 2, head_dim)  # as KVStorage has it
    k_and_v = place.integers(-127, 128, *shape, dtype=torch.int8) if is_int8 else place.randn(*shape)
    return {
        "k_pool": k_and_v[:, :, 0],
        "v_pool": k_and_v[:, :, 1],
        "scales": (place.randn(slots, kv_heads, 2).abs() / 64 + 1 / 64).half() if is_int8 else None,
        "req_to_token": table,
        "rows": torch.arange(len(contexts), device=device, dtype=torch.int32),
        "context_lengths": torch.tensor(contexts, device=device, dtype=torch.int32),
        "max_context_length": width,
        "scale": head_dim**-0.5,
        "alibi_slopes": 2.0 ** -torch.linspace(0, 8, kv_heads, device=device) if variant == "ALiBi" else None,
    }


def pool_bytes(context_tokens: int, kv_heads: int, head_dim: int, variant: str) -> int:
    """Of K and V, with the scales."""
    return 2 * context_tokens * kv_heads * (head_dim + 2 if variant == "int8" else 2 * head_dim)
