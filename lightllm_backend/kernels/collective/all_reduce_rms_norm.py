# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The sum of all ranks' products, its addition to the residual, and the root-mean-square norm of that, in one kernel.

Each program sends its row to the other ranks and waits for theirs (see mailboxes.py), not for other programs of its own
rank. A GPU starts programs in order: of the rows that are not done, the first is under way on all ranks, or will be, so
that there is always one that gets on, however few have room at once.

In one shot every rank sends its row to all others, and all add. In two, a row has an owner, who alone receives the
others', adds them and the residual, and sends the sum back: two ways instead of one for 2 / ranks of the bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.collective.mailboxes import EMPTY, SENT_FOR_EMPTY, Mailboxes
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous


@triton.jit
def _bits(row, empty: tl.constexpr, sent_for_empty: tl.constexpr, box_type: tl.constexpr):
    bits = row.to(box_type, bitcast=True)
    return tl.where(bits == empty, sent_for_empty, bits).to(box_type)


@triton.jit
def _send(boxes, receiver, own_box, offset, bits, live):
    box = tl.multiple_of(tl.load(boxes + receiver).to(own_box.dtype), 16)
    # Written through to the other GPU's memory at once.
    tl.store(box + offset, bits, mask=live, cache_modifier=".wt")


@triton.jit
def _send_to_others(boxes, own_box, first, bits, live, sender_stride, column, rank: tl.constexpr, ranks: tl.constexpr):
    # Not all to the same rank at first.
    for distance in tl.static_range(1, ranks):
        _send(boxes, (rank + distance) % ranks, own_box, first + rank * sender_stride + column, bits, live)


@triton.jit
def _receive(place, live, row_type: tl.constexpr, empty: tl.constexpr):
    """One rank's row, as soon as all of it is there."""
    bits = tl.load(place, mask=live, other=0, volatile=True)
    while tl.max((bits == empty).to(tl.int32), 0) > 0:
        bits = tl.load(place, mask=live, other=0, volatile=True)
    # The reduction is over, so every thread has read.
    tl.store(place, tl.full(bits.shape, empty, dtype=bits.dtype), mask=live)
    return bits.to(row_type, bitcast=True)


@triton.jit
def _receive_sum(
    place,
    own_bits,
    live,
    sender_stride,
    row_type: tl.constexpr,
    rank: tl.constexpr,
    ranks: tl.constexpr,
    empty: tl.constexpr,
):
    """Of all ranks' rows, float32, in order of rank, so that whoever adds comes to the same bits."""
    total = tl.zeros(own_bits.shape, dtype=tl.float32)
    missing = 1
    while missing > 0:
        total = tl.zeros(own_bits.shape, dtype=tl.float32)
        is_missing = tl.zeros(own_bits.shape, dtype=tl.int32)
        for sender in tl.static_range(ranks):
            arrived = own_bits
            if sender != rank:
                arrived = tl.load(place + sender * sender_stride, mask=live, other=0, volatile=True)
            is_missing |= (arrived == empty).to(tl.int32)
            total += arrived.to(row_type, bitcast=True).to(tl.float32)
        missing = tl.max(is_missing, 0)
    # The reduction is over, so every thread has read.
    nothing = tl.full(own_bits.shape, empty, dtype=own_bits.dtype)
    for sender in tl.static_range(ranks):
        if sender != rank:
            tl.store(place + sender * sender_stride, nothing, mask=live)
    return total


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
    in_two_shots: tl.constexpr,
    empty: tl.constexpr,
    sent_for_empty: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    row_type: tl.constexpr = residual.dtype.element_ty
    box_type: tl.constexpr = own_box.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    live = column < dim
    scale = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    wait_for_previous(is_dependent)
    residual_row = residual + token * residual_stride + column
    before = tl.load(residual_row, mask=live, other=0.0).to(tl.float32)
    turn = tl.load(turns + token)
    sender_stride = mailbox_rows * dim
    first = (turn * ranks * mailbox_rows + token) * dim
    place = own_box + (first + column)
    own = tl.zeros([block], dtype=tl.float32)
    for part in tl.static_range(parts):
        own += tl.load(x + (part * tokens + token) * x_stride + column, mask=live, other=0.0).to(tl.float32)
    own_bits = _bits(own.to(row_type), empty, sent_for_empty, box_type)
    if in_two_shots:
        owner = token % ranks
        if owner == rank:
            total = _receive_sum(place, own_bits, live, sender_stride, row_type, rank, ranks, empty)
            total = (before + total).to(row_type)
            bits = _bits(total, empty, sent_for_empty, box_type)
            _send_to_others(boxes, own_box, first, bits, live, sender_stride, column, rank, ranks)
        else:
            _send(boxes, owner, own_box, first + rank * sender_stride + column, own_bits, live)
            total = _receive(place + owner * sender_stride, live, row_type, empty)
    else:
        _send_to_others(boxes, own_box, first, own_bits, live, sender_stride, column, rank, ranks)
        total = _receive_sum(place, own_bits, live, sender_stride, row_type, rank, ranks, empty)
        total = (before + total).to(row_type)
    tl.store(turns + token, 1 - turn)
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
        in_two_shots=mailboxes.take_two_shots(tokens),
        empty=EMPTY,
        sent_for_empty=SENT_FOR_EMPTY,
        block=block,
        num_warps=min(16, max(1, block // 512)),
        **dependent_launch(x.device),
    )
    return out
