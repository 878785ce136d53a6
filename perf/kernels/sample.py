# SPDX-License-Identifier: Apache-2.0
"""The choice of the next token: greedy, drawn from all tokens, and drawn after top-k and top-p."""

from __future__ import annotations

import torch

from perf.kernels.measure import Arguments, Case, Place

# What it is called: temperature, top_k, top_p.
KINDS = {"greedy": (0.0, -1, 1.0), "drawn": (1.0, -1, 1.0), "top-k 50, top-p 0.9": (0.8, 50, 0.9)}
SIZES = [(kind, sequences, vocab) for kind in KINDS for vocab in (32000, 128256) for sequences in (1, 256)]
TINY = [(kind, 2, 300) for kind in KINDS]


def case(place: Place, kind: str, sequences: int, vocab_size: int) -> Case:
    temperature, top_k, top_p = KINDS[kind]

    def make() -> Arguments:
        return {
            "logits": 4 * place.randn(sequences, vocab_size).float(),
            "temperature": place.full(temperature, sequences),
            "top_k": place.full(top_k, sequences, dtype=torch.int32),
            "top_p": place.full(top_p, sequences),
            "min_p": place.full(0.0, sequences),
            "seed": place.integers(0, 2**62, sequences, dtype=torch.int64),
            "position": place.integers(0, 4096, sequences),
            "places": torch.arange(sequences, device=place.device),
            "table": place.full(0, sequences, dtype=torch.int32),
        }

    return Case(
        label=f"{kind}, {sequences} x {vocab_size}",
        make=make,
        bytes=4 * sequences * vocab_size,
        torch={"argmax": lambda a: lambda: a["logits"].argmax(-1)} if kind == "greedy" else {},
        changes=("table",),
    )
