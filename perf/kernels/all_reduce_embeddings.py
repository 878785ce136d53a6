# SPDX-License-Identifier: Apache-2.0
"""The embeddings of tokens, in a group of one that holds all: what they cost beside the exchange."""

from __future__ import annotations

import torch

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, LamportBuffers, bits_type_of
from perf.kernels.measure import Arguments, Case, Place

VOCABULARY = 4000
SIZES = [(tokens, 4096) for tokens in (1, 32, 256)]
TINY = [(3, 96)]


def case(place: Place, tokens: int, dim: int) -> Case:
    def make() -> Arguments:
        buffer = torch.full((2, 1, tokens, dim), EMPTY, dtype=bits_type_of(place.dtype), device=place.device)
        return {
            "input_ids": place.integers(0, VOCABULARY, tokens), "weight": place.randn(VOCABULARY, dim),
            "first_id": 0, "held": VOCABULARY, "buffers": LamportBuffers.of([buffer], rank=0),
        }  # fmt: skip

    return Case(label=f"{tokens} x {dim}", make=make, bytes=4 * tokens * dim)
