# SPDX-License-Identifier: Apache-2.0
"""The sum over ranks with the norm that follows, in a group of one: what it costs beside the exchange.

Between GPUs, see perf/all_reduce.py.
"""

from __future__ import annotations

import torch

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, LamportBuffers, bits_type_of
from perf.kernels.measure import Arguments, Case, Place

SIZES = [(tokens, dim) for dim in (4096, 8192) for tokens in (1, 32, 256)]
TINY = [(2, 96), (3, 128)]


def case(place: Place, tokens: int, dim: int) -> Case:
    def make() -> Arguments:
        buffer = torch.full((2, 1, tokens, dim), EMPTY, dtype=bits_type_of(place.dtype), device=place.device)
        x, residual = place.randn(tokens, dim), place.randn(tokens, dim)
        buffers = LamportBuffers.of([buffer], rank=0)
        return {"x": x, "weight": place.randn(dim), "eps": 1e-5, "residual": residual, "buffers": buffers}

    return Case(
        label=f"{tokens} x {dim}",
        make=make,
        bytes=2 * (4 * tokens * dim + dim),
        changes=("residual",),
    )
