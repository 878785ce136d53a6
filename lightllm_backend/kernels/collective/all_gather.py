# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Gathers the columns that each rank has of a matrix, such as logits, on all ranks.

A row of x may be wider than one of the buffers; it then travels in pieces, each as a row of its own (see messages.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, SENT_FOR_EMPTY, LamportBuffers
from lightllm_backend.kernels.collective.messages import address_of, as_bits, receive, send_to_others
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.sizes import next_power_of_2


@triton.jit
def all_gather_kernel(
    x,
    out,
    own_buffer,
    buffers,
    turns,
    columns,
    pieces,
    dim,
    buffer_rows,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    empty: tl.constexpr,
    sent_for_empty: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    """Handles one piece of a row: sends this rank's, and receives all others'."""
    row_type: tl.constexpr = x.dtype.element_ty
    message = tl.program_id(0).to(tl.int64)
    row = message // pieces
    place = tl.arange(0, block)
    column = message % pieces * dim + place
    live = (place < dim) & (column < columns)
    next_address = address_of(buffers, (rank + 1) % ranks)
    wait_for_previous(is_dependent)
    turn = tl.load(turns + message)
    own = tl.load(x + row * columns + column, mask=live, other=0.0)
    bits = as_bits(own, empty, sent_for_empty, own_buffer.dtype.element_ty)
    sender_stride = buffer_rows * dim
    first = (turn * ranks * buffer_rows + message) * dim
    send_to_others(buffers, next_address, own_buffer, first, bits, live, sender_stride, place, rank, ranks)
    gathered = out + row * ranks * columns + column
    tl.store(gathered + rank * columns, bits.to(row_type, bitcast=True), mask=live)
    for sender in tl.static_range(ranks):
        if sender != rank:
            arrived = receive(own_buffer + (first + sender * sender_stride + place), live, row_type, empty)
            tl.store(gathered + sender * columns, arrived, mask=live)
    tl.store(turns + message, 1 - turn)


def all_gather(x: Tensor, buffers: LamportBuffers) -> Tensor:
    rows, columns = x.shape
    own = buffers.by_rank[buffers.rank]
    _, ranks, buffer_rows, dim = own.shape
    pieces = buffers.pieces(columns)
    assert buffers.fit(rows * pieces, dim)
    assert own.itemsize == x.itemsize
    assert x.is_contiguous()
    out = torch.empty((rows, ranks * columns), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    block = next_power_of_2(dim)
    all_gather_kernel[(rows * pieces,)](
        x,
        out,
        own,
        buffers.addresses,
        buffers.turns,
        columns,
        pieces,
        dim,
        buffer_rows,
        rank=buffers.rank,
        ranks=ranks,
        empty=EMPTY,
        sent_for_empty=SENT_FOR_EMPTY,
        block=block,
        num_warps=min(16, max(1, block // 512)),
        **dependent_launch(x.device),
    )
    return out
