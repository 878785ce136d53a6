# SPDX-License-Identifier: Apache-2.0
"""Decode attention: LLaMA-7B's heads, LLaMA-3-8B's, which share K and V, 70B's on one of four GPUs, BLOOM's.

With a norm of heads: Qwen3-8B's, and Gemma-3-12B's within a window.
"""

from __future__ import annotations

from lightllm_backend.kernels.attention.head_norm import HeadNorm
from perf.kernels.measure import Arguments, Case, Place
from perf.kernels.pool import mixed_contexts, pool_arguments, pool_bytes

# Sequences, context of each (0: mixed, 395 on average), heads, KV heads, head_dim, variant.
SIZES = [
    *((sequences, 192, 32, kv_heads, 128, "") for kv_heads in (32, 8) for sequences in (1, 8, 32, 64, 128, 256)),
    *((1, 4096, 32, kv_heads, 128, "") for kv_heads in (32, 8)),
    (32, 4096, 32, 32, 128, ""),
    (64, 4096, 32, 8, 128, ""),
    *((580, 0, 32, kv_heads, 128, "") for kv_heads in (32, 8)),
    *((sequences, 192, 16, 2, 128, "") for sequences in (1, 32, 128)),
    *((sequences, 192, 32, 32, 128, "ALiBi") for sequences in (1, 256)),
    *((sequences, 192, 32, 8, 128, "norm") for sequences in (1, 64)),
    *((sequences, 1024, 16, 8, 256, variant) for variant in ("", "norm") for sequences in (1, 64)),
]
TINY = [(2, 40, 4, 2, 16, ""), (2, 40, 4, 2, 16, "norm"), (3, 9, 2, 2, 16, ""), (2, 70, 2, 2, 16, "ALiBi")]
MEAN_CONTEXT = 395


def case(place: Place, sequences: int, context: int, heads: int, kv_heads: int, head_dim: int, variant: str) -> Case:
    contexts = [context] * sequences if context else mixed_contexts(sequences, MEAN_CONTEXT)

    def make() -> Arguments:
        q, k, v = place.randn(sequences, heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), 1)
        angle = 100 * place.randn(sequences, head_dim // 2).float()
        rest = pool_arguments(place, contexts, kv_heads, head_dim, variant)
        slots = rest["req_to_token"].gather(1, rest["context_lengths"][:, None].long() - 1).squeeze(1)
        out = place.randn(sequences, heads, head_dim)
        norm = HeadNorm(place.randn(head_dim), place.randn(head_dim), 1e-6) if variant == "norm" else None
        turned = {"cos": angle.cos(), "sin": angle.sin(), "norm": norm}
        return {"q": q, "k": k, "v": v, **turned, "slots": slots, **rest, "out": out}

    pool = pool_bytes(sum(contexts), kv_heads, head_dim, variant)
    lengths = context or f"mixed, mean {MEAN_CONTEXT}"
    return Case(
        label=f"{sequences} x {lengths}, {heads} and {kv_heads} heads, {variant}".rstrip(", "),
        make=make,
        bytes=pool + 2 * 2 * sequences * heads * head_dim + 4 * sum(contexts),
        operations=4 * heads * head_dim * sum(contexts),
        changes=("k_pool", "v_pool", "scales"),
    )
