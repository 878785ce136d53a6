# SPDX-License-Identifier: Apache-2.0
"""Masks of structured output: tokens that may not come next are ruled out."""

from __future__ import annotations

import torch

from perf.kernels.measure import Arguments, Case, Place

SIZES = [(1, 32000), (64, 32000), (64, 128256), (256, 128256)]
TINY = [(3, 70)]


def case(place: Place, sequences: int, vocab_size: int) -> Case:
    words = -(-vocab_size // 32)

    def make() -> Arguments:
        return {
            "logits": place.randn(sequences, vocab_size),
            "masks": place.full(1, sequences, words, dtype=torch.int32),  # one token in 32, as within a JSON document
            "mask_rows": torch.arange(sequences, dtype=torch.int32, device=place.device),
            "out": place.full(0, sequences, vocab_size, dtype=torch.float32),
        }

    return Case(
        label=f"{sequences} x {vocab_size}",
        make=make,
        bytes=sequences * (vocab_size * (place.dtype.itemsize + 4) + words * 4),
        changes=("out",),
    )
