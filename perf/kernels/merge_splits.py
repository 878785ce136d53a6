# SPDX-License-Identifier: Apache-2.0
"""The joining of attention over parts of a context."""

from __future__ import annotations

import torch

from perf.kernels.measure import Arguments, Case, Place

SIZES = [(1, 32, 32), (8, 32, 4), (32, 32, 2), (32, 32, 8), (1, 16, 64)]
TINY = [(2, 3, 5)]
HEAD_DIM, BLOCK_TOKENS = 128, 32


def case(place: Place, sequences: int, heads: int, splits: int) -> Case:
    def make() -> Arguments:
        partial = place.randn(sequences, heads, splits, HEAD_DIM, dtype=torch.float32)
        log_sums = place.randn(sequences, heads, splits, dtype=torch.float32)
        lengths = torch.full((sequences,), splits * BLOCK_TOKENS, dtype=torch.int32, device=place.device)
        return {
            "partial": partial,
            "log_sums": log_sums,
            "context_lengths": lengths,
            "window": 0,
            "block_tokens": BLOCK_TOKENS,
            "out": place.randn(sequences, heads, HEAD_DIM),
        }

    return Case(
        label=f"{sequences} x {heads} heads x {splits} splits",
        make=make,
        bytes=sequences * heads * (4 * splits * (HEAD_DIM + 1) + 2 * HEAD_DIM),
    )
