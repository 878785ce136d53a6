# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Embeddings of tokens when each rank holds those of some tokens: a sum over ranks, all but one of which add zeros.

Each program handles one token (see messages.py). The ranks that hold nothing of a token send too: a rank may only use a
place again once it has heard from every other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, SENT_FOR_EMPTY, LamportBuffers
from lightllm_backend.kernels.collective.messages import address_of, as_bits, receive_sum, send_to_others
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.sizes import next_power_of_2


@triton.jit(do_not_specialize=["first_id", "held"])
def all_reduce_embeddings_kernel(
    input_ids,
    weight,
    out,
    own_buffer,
    buffers,
    turns,
    first_id,
    held,
    dim,
    buffer_rows,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    empty: tl.constexpr,
    sent_for_empty: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    row_type: tl.constexpr = weight.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    live = column < dim
    next_address = address_of(buffers, (rank + 1) % ranks)
    wait_for_previous(is_dependent)
    turn = tl.load(turns + token)
    held_id = tl.load(input_ids + token).to(tl.int64) - first_id
    width = tl.where((held_id >= 0) & (held_id < held), dim, 0)
    own = tl.load(weight + held_id * dim + column, mask=column < width, other=0.0)
    bits = as_bits(own, empty, sent_for_empty, own_buffer.dtype.element_ty)
    sender_stride = buffer_rows * dim
    first = (turn * ranks * buffer_rows + token) * dim
    send_to_others(buffers, next_address, own_buffer, first, bits, live, sender_stride, column, rank, ranks)
    total = receive_sum(own_buffer + (first + column), bits, live, sender_stride, row_type, rank, ranks, empty)
    tl.store(turns + token, 1 - turn)
    tl.store(out + token * dim + column, total.to(row_type), mask=live)


def all_reduce_embeddings(
    input_ids: Tensor, weight: Tensor, first_id: int, held: int, buffers: LamportBuffers
) -> Tensor:
    tokens, dim = len(input_ids), weight.shape[1]
    own = buffers.by_rank[buffers.rank]
    assert buffers.fit(tokens, dim)
    assert own.itemsize == weight.itemsize
    assert input_ids.is_contiguous()
    assert weight.is_contiguous()
    out = torch.empty((tokens, dim), dtype=weight.dtype, device=weight.device)
    if tokens == 0:
        return out
    block = next_power_of_2(dim)
    all_reduce_embeddings_kernel[(tokens,)](
        input_ids,
        weight,
        out,
        own,
        buffers.addresses,
        buffers.turns,
        first_id,
        held,
        dim,
        own.shape[2],
        rank=buffers.rank,
        ranks=own.shape[1],
        empty=EMPTY,
        sent_for_empty=SENT_FOR_EMPTY,
        block=block,
        num_warps=min(16, max(1, block // 512)),
        **dependent_launch(weight.device),
    )
    return out
