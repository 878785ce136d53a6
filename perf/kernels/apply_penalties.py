# SPDX-License-Identifier: Apache-2.0
"""All three penalties on the logits of every sequence, after the counting of its tokens."""

from __future__ import annotations

from perf.kernels.count_tokens import history
from perf.kernels.measure import Arguments, Case, Place

SIZES = [(1, 32000), (32, 32000), (256, 32000), (256, 128256)]
TINY = [(2, 300)]


def case(place: Place, sequences: int, vocab_size: int) -> Case:
    def make() -> Arguments:
        return {
            "logits": place.randn(sequences, vocab_size).float(),
            **history(place, sequences, vocab_size),
            "presence": place.full(0.1, sequences),
            "frequency": place.full(0.1, sequences),
            "repetition": place.full(1.1, sequences),
            "min_tokens": place.integers(0, 1, sequences),
            "ending_ids": place.integers(2, 3, sequences, 1),
        }

    return Case(
        label=f"{sequences} x {vocab_size}",
        make=make,
        bytes=2 * 4 * sequences * vocab_size,
        changes=("logits",),
    )
