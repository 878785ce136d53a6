# SPDX-License-Identifier: Apache-2.0
"""Decode attention over a pool of int8: LLaMA-7B's heads, and LLaMA-3-8B's, which share K and V."""

from __future__ import annotations

from dataclasses import replace

from perf.kernels import token_attention
from perf.kernels.measure import Arguments, Case, Place

SIZES = [
    *((sequences, 192, 32, kv_heads, 128) for kv_heads in (32, 8) for sequences in (1, 8, 32, 64, 128, 256)),
    *((1, 4096, 32, kv_heads, 128) for kv_heads in (32, 8)),
    (32, 4096, 32, 32, 128),
    (64, 4096, 32, 8, 128),
    *((580, 0, 32, kv_heads, 128) for kv_heads in (32, 8)),
]
TINY = [(2, 40, 4, 2, 16), (3, 9, 2, 2, 16)]


def case(place: Place, sequences: int, context: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    plain = token_attention.case(place, sequences, context, heads, kv_heads, head_dim, "int8")

    def make() -> Arguments:
        arguments = plain.make()
        del arguments["alibi_slopes"]
        return arguments

    return replace(plain, make=make)
