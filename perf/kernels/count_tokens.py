# SPDX-License-Identifier: Apache-2.0
"""The counting of each sequence's tokens: half of them are its prompt's."""

from __future__ import annotations

import torch

from perf.kernels.measure import Arguments, Case, Place

SIZES = [(1, 32000), (32, 32000), (256, 32000), (256, 128256)]
TINY = [(2, 300)]
TOKENS, TABLE_WIDTH = 512, 3072


def history(place: Place, sequences: int, vocab_size: int) -> Arguments:
    """The table of tokens, and whose rows and how much of them is meant."""
    return {
        "tokens": place.integers(0, vocab_size, sequences, TABLE_WIDTH),
        "rows": torch.arange(sequences, device=place.device, dtype=torch.int32),
        "prompt_lengths": place.integers(TOKENS // 2, TOKENS // 2 + 1, sequences),
        "lengths": place.integers(TOKENS, TOKENS + 1, sequences),
    }


def case(place: Place, sequences: int, vocab_size: int) -> Case:
    return Case(
        label=f"{sequences} x {vocab_size}",
        make=lambda: {**history(place, sequences, vocab_size), "vocab_size": vocab_size},
        bytes=4 * sequences * (vocab_size + TOKENS),
    )
