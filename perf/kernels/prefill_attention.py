# SPDX-License-Identifier: Apache-2.0
"""Attention of prompts: whole ones beside PyTorch's best, a chunk behind a cached context, int8 K and V, ALiBi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.runner.prompt_tiling import order_tiles
from perf.kernels.measure import Arguments, Case, Place
from perf.kernels.pool import pool_arguments, pool_bytes

# Sequences, queries and cached tokens of each, heads, KV heads, head_dim, variant.
SIZES = [
    (1, 8192, 0, 32, 32, 128, ""),
    (8, 1024, 0, 32, 32, 128, ""),
    (64, 128, 0, 32, 32, 128, ""),
    (256, 128, 0, 32, 32, 128, ""),
    (1, 512, 4096, 32, 32, 128, ""),
    (1, 8192, 0, 32, 32, 128, "int8"),
    (8, 1024, 0, 32, 32, 128, "ALiBi"),
    (1, 8192, 0, 32, 8, 128, ""),
    (8, 1024, 0, 32, 8, 128, ""),
    (64, 128, 0, 16, 2, 128, ""),
    (1, 8192, 0, 16, 8, 256, ""),
    (8, 1024, 0, 16, 8, 256, ""),
]
TINY = [(2, 9, 0, 2, 1, 16, ""), (1, 5, 20, 2, 2, 16, "int8"), (2, 9, 0, 2, 2, 16, "ALiBi")]


def case(
    place: Place, sequences: int, queries: int, cached: int, heads: int, kv_heads: int, head_dim: int, variant: str
) -> Case:
    tokens, context = sequences * queries, queries + cached

    def make() -> Arguments:
        starts = torch.arange(0, tokens + 1, queries, device=place.device, dtype=torch.int32)
        q, k, v = place.randn(tokens, heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), 1)
        rest = pool_arguments(place, [context] * sequences, kv_heads, head_dim, variant)
        del rest["max_context_length"]
        # New tokens' K and V are in both places, as rotary_kv_write leaves them.
        places = rest["req_to_token"][:, cached:context].flatten().long()
        for values, name in ((k, "k"), (v, "v")):
            new = rest[f"{name}_pool"][places]
            scales = rest["scales"]
            values.copy_(new if scales is None else new * scales[places, :, "kv".index(name)].unsqueeze(-1))
        lengths = np.full(sequences, queries, np.int32)
        tiles = torch.from_numpy(order_tiles(np.full(sequences, cached, np.int32), lengths, 0)).to(place.device)
        whole = WholePromptTiles(tiles, are_all=True) if len(tiles) else None
        return {"q": q, "k": k, "v": v, "query_starts": starts, "whole_prompts": whole, **rest}

    def packed(backend: SDPBackend) -> Callable[[Arguments], Callable[[], Any]]:
        """PyTorch's, on contiguous tokens: [sequences, heads, queries, head_dim] of [sequences, queries, …]."""

        def prepare(_: Arguments) -> Callable[[], Any]:
            q, k, v = (
                place.randn(sequences, queries, count, head_dim).transpose(1, 2)
                for count in (heads, kv_heads, kv_heads)
            )

            def attend() -> Any:
                with sdpa_kernel(backend):
                    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

            return attend

        return prepare

    pairs = sequences * (queries * cached + queries * (queries + 1) // 2)
    lengths = f"{queries} behind {cached}" if cached else str(queries)
    is_plain = cached == 0 and not variant
    return Case(
        label=f"{sequences} x {lengths}, {heads} and {kv_heads} heads, {variant}".rstrip(", "),
        make=make,
        bytes=2 * 2 * tokens * heads * head_dim + pool_bytes(sequences * context, kv_heads, head_dim, variant),
        operations=4 * heads * head_dim * pairs,
        torch={
            "cuDNN": packed(SDPBackend.CUDNN_ATTENTION),
            "flash": packed(SDPBackend.FLASH_ATTENTION),
        }
        if is_plain
        else {},
    )
