# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding and the writing of K and V to scattered slots, out of a fused product. BLOOM's are not rotated."""

from __future__ import annotations

import torch

from perf.kernels.measure import Arguments, Case, Place
from perf.kernels.pool import pool_bytes

BLOOM = "no rotation"
# Tokens, heads, KV heads, head_dim, variant.
SIZES = [
    *((tokens, 32, 32, 128, variant) for variant in ("", "int8", BLOOM) for tokens in (1, 32, 256, 8192)),
    *((tokens, 16, 2, 128, "") for tokens in (1, 32, 256)),  # LLaMA-2-70B on one of four GPUs
]
TINY = [(3, 4, 2, 16, ""), (3, 2, 2, 16, "int8"), (3, 2, 2, 16, BLOOM)]


def case(place: Place, tokens: int, heads: int, kv_heads: int, head_dim: int, variant: str) -> Case:
    slots, is_int8 = 4 * tokens, variant == "int8"
    rotated = 0 if variant == BLOOM else head_dim

    def make() -> Arguments:
        q, k, v = place.randn(tokens, heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), 1)
        angle = 100 * place.randn(tokens, rotated // 2).float()
        pools = [place.full(0, slots, kv_heads, head_dim, dtype=torch.int8 if is_int8 else place.dtype) for _ in "kv"]
        scales = place.full(1, slots, kv_heads, 2, dtype=torch.float16) if is_int8 else None
        return {
            "q": q, "k": k, "v": v, "cos": angle.cos(), "sin": angle.sin(),
            "slots": torch.randperm(slots, device=place.device, dtype=torch.int32)[:tokens],
            "k_pool": pools[0], "v_pool": pools[1], "scales": scales,
        }  # fmt: skip

    # Queries are read and written, and keys are written twice; cosine and sine are float32.
    queries = tokens * (2 * 2 * heads + 2 * kv_heads + 4) * rotated
    keys_and_values = tokens * 2 * 2 * kv_heads * head_dim + pool_bytes(tokens, kv_heads, head_dim, variant)
    return Case(
        label=f"{tokens} tokens, {heads} and {kv_heads} heads, {variant}".rstrip(", "),
        make=make,
        bytes=queries + keys_and_values,
        changes=("q", "k", "v", "k_pool", "v_pool", "scales"),
    )
