# SPDX-License-Identifier: Apache-2.0
"""Decode attention where each query head has K and V of its own: LLaMA-7B's, and BLOOM's with ALiBi."""

from __future__ import annotations

from perf.kernels.token_attention import case

__all__ = ["SIZES", "TINY", "case"]

SIZES = [
    *((sequences, 192, 32, 32, 128, variant) for variant in ("", "int8") for sequences in (1, 8, 32, 64, 128, 256)),
    *((sequences, 4096, 32, 32, 128, variant) for variant in ("", "int8") for sequences in (1, 32)),
    *((sequences, 192, 32, 32, 128, "ALiBi") for sequences in (1, 256)),
    *((580, 0, 32, 32, 128, variant) for variant in ("", "int8")),
]
TINY = [(2, 40, 2, 2, 16, ""), (3, 9, 2, 2, 16, "int8"), (2, 70, 2, 2, 16, "ALiBi")]
