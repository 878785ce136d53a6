# SPDX-License-Identifier: Apache-2.0
"""The greedy choice of the next token."""

from __future__ import annotations

import torch

from perf.kernels.measure import Arguments, Case, Place

SIZES = [(1, 32000), (64, 32000), (256, 32000), (64, 128256)]
TINY = [(3, 70)]


def case(place: Place, sequences: int, vocab_size: int) -> Case:
    def make() -> Arguments:
        return {
            "logits": place.randn(sequences, vocab_size),
            "places": torch.arange(sequences, device=place.device),
            "table": place.full(0, sequences, dtype=torch.int32),
        }

    return Case(
        label=f"{sequences} x {vocab_size}",
        make=make,
        bytes=sequences * (vocab_size * place.dtype.itemsize + 16),
        torch={"argmax": lambda arguments: lambda: arguments["logits"].argmax(-1)},
        changes=("table",),
    )
