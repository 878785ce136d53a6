# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The sum of all ranks' products, its addition to the residual, and the root-mean-square norm of that, in one kernel.

Each program sends its row to the other ranks and waits for theirs (see mailboxes.py), not for other programs of its own
rank. A GPU starts programs in order: of the rows that are not done, the first is under way on all ranks, or will be, so
that there is always one that gets on, however few have room at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.mailboxes import EMPTY, SENT_FOR_EMPTY, Mailboxes


@triton.jit(do_not_specialize=["tokens"])
def all_reduce_rms_norm_kernel(
    x,
    weight,
    residual,
    out,
    own_box,
    boxes,
    turns,
    x_stride,
    residual_stride,
    tokens,
    dim,
    mailbox_rows,
    eps,
    rank: tl.constexpr,
    parts: tl.constexpr,
    ranks: tl.constexpr,
    empty: tl.constexpr,
    sent_for_empty: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    live = column < dim
    scale = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    wait_for_previous(is_dependent)
    residual_row = residual + token * residual_stride + column
    before = tl.load(residual_row, mask=live, other=0.0).to(tl.float32)
    turn = tl.load(turns + token)
    first = (turn * ranks * mailbox_rows + token) * dim
    own = tl.zeros([block], dtype=tl.float32)
    for part in tl.static_range(parts):
        own += tl.load(x + (part * tokens + token) * x_stride + column, mask=live, other=0.0).to(tl.float32)
    sent = own.to(residual.dtype.element_ty).to(own_box.dtype.element_ty, bitcast=True)
    sent = tl.where(sent == empty, sent_for_empty, sent).to(own_box.dtype.element_ty)
    # Not all to the same rank at first.
    for distance in tl.static_range(1, ranks):
        box = tl.multiple_of(tl.load(boxes + (rank + distance) % ranks).to(own_box.dtype), 16)
        # Written through to the other GPU's memory at once.
        tl.store(box + (first + rank * mailbox_rows * dim + column), sent, mask=live, cache_modifier=".wt")

    place = own_box + (first + column)
    # In order of rank, so that all ranks come to the same bits.
    total = tl.zeros([block], dtype=tl.float32)
    missing = 1
    while missing > 0:
        total = tl.zeros([block], dtype=tl.float32)
        is_missing = tl.zeros([block], dtype=tl.int32)
        for sender in tl.static_range(ranks):
            arrived = sent
            if sender != rank:
                arrived = tl.load(place + sender * mailbox_rows * dim, mask=live, other=0, volatile=True)
            is_missing |= (arrived == empty).to(tl.int32)
            total += arrived.to(residual.dtype.element_ty, bitcast=True).to(tl.float32)
        missing = tl.max(is_missing, 0)
    # The reduction is over, so every thread has read.
    nothing = tl.full([block], empty, dtype=own_box.dtype.element_ty)
    for sender in tl.static_range(ranks):
        if sender != rank:
            tl.store(place + sender * mailbox_rows * dim, nothing, mask=live)
    tl.store(turns + token, 1 - turn)

    total = (before + total).to(residual.dtype.element_ty)
    tl.store(residual_row, total, mask=live)
    value = total.to(tl.float32)
    normalized = value * tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
    # Rounded before the product with the weight, as the models were trained.
    normalized = normalized.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * dim + column, (normalized * scale).to(out.dtype.element_ty), mask=live)


def all_reduce_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor, mailboxes: Mailboxes) -> Tensor:
    tokens, dim = x.shape[-2:]
    parts = x.shape[0] if x.dim() == 3 else 1
    own = mailboxes.boxes[mailboxes.rank]
    assert mailboxes.take(tokens, dim)
    assert own.itemsize == residual.itemsize
    assert x.stride(-1) == residual.stride(-1) == 1
    assert parts == 1 or x.stride(0) == tokens * x.stride(1)
    assert weight.is_contiguous()
    out = torch.empty((tokens, dim), dtype=weight.dtype, device=x.device)
    if tokens == 0:
        return out
    block = triton.next_power_of_2(dim)
    all_reduce_rms_norm_kernel[(tokens,)](
        x,
        weight,
        residual,
        out,
        own,
        mailboxes.addresses,
        mailboxes.turns,
        x.stride(-2),
        residual.stride(0),
        tokens,
        dim,
        own.shape[2],
        eps,
        rank=mailboxes.rank,
        parts=parts,
        ranks=own.shape[1],
        empty=EMPTY,
        sent_for_empty=SENT_FOR_EMPTY,
        block=block,
        num_warps=min(16, max(1, block // 512)),
        **dependent_launch(x.device),
    )
    return out
