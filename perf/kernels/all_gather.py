# SPDX-License-Identifier: Apache-2.0
"""The gathering of logits, in a group of one: what it costs beside the exchange.

Between GPUs, see perf/all_reduce.py.
"""

from __future__ import annotations

import torch

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, LamportBuffers, bits_type_of
from perf.kernels.measure import Arguments, Case, Place

# Rows, columns, and the columns of the buffer.
SIZES = [(rows, 16000, 4096) for rows in (1, 32, 256)]
TINY = [(2, 100, 48)]


def case(place: Place, rows: int, columns: int, dim: int) -> Case:
    def make() -> Arguments:
        pieces = rows * -(-columns // dim)
        buffer = torch.full((2, 1, pieces, dim), EMPTY, dtype=bits_type_of(place.dtype), device=place.device)
        return {"x": place.randn(rows, columns), "buffers": LamportBuffers.of([buffer], rank=0)}

    return Case(label=f"{rows} x {columns}", make=make, bytes=4 * rows * columns)
