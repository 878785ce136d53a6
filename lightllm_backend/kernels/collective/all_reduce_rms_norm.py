# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""All-reduce of a product, addition to the residual, and root-mean-square norm, in one kernel.

Each program handles one row (see messages.py).

One shot: every rank sends its row to all others, and all of them add. Two shots: each row has an owner, which alone
receives the others' rows, adds them and the residual, and sends the sum back: two trips instead of one, for 2 / ranks
of the bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, SENT_FOR_EMPTY, LamportBuffers
from lightllm_backend.kernels.collective.messages import address_of, as_bits, receive, receive_sum, send, send_to_others
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.norm.rms_norm import rms_normed
from lightllm_backend.kernels.quantized.choice import takes_rounded
from lightllm_backend.kernels.quantized.quantize_tokens import rounded_row
from lightllm_backend.kernels.quantized.rounded_tokens import Activations, RoundedTokens
from lightllm_backend.kernels.quantized.weight import LIMITS, MIN_INPUT_SCALE, QuantizedWeight, Weight
from lightllm_backend.kernels.sizes import next_power_of_2


@triton.jit(do_not_specialize=["tokens"])
def all_reduce_rms_norm_kernel(
    x,
    weight,
    post_weight,
    residual,
    out,
    out_scales,
    input_scale,
    own_buffer,
    buffers,
    turns,
    x_stride,
    residual_stride,
    tokens,
    dim,
    buffer_rows,
    eps,
    limit,
    min_scale,
    rank: tl.constexpr,
    parts: tl.constexpr,
    ranks: tl.constexpr,
    in_two_shots: tl.constexpr,
    has_post_norm: tl.constexpr,
    is_rounded: tl.constexpr,
    is_static: tl.constexpr,
    in_fragments: tl.constexpr,
    empty: tl.constexpr,
    sent_for_empty: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    row_type: tl.constexpr = residual.dtype.element_ty
    bits_type: tl.constexpr = own_buffer.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    live = column < dim
    weight_type: tl.constexpr = weight.dtype.element_ty
    scale = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    if has_post_norm:
        post_scale = tl.load(post_weight + column, mask=live, other=0.0).to(tl.float32)
    next_address = address_of(buffers, (rank + 1) % ranks)
    wait_for_previous(is_dependent)
    residual_row = residual + token * residual_stride + column
    before = tl.load(residual_row, mask=live, other=0.0).to(tl.float32)
    turn = tl.load(turns + token)
    sender_stride = buffer_rows * dim
    first = (turn * ranks * buffer_rows + token) * dim
    place = own_buffer + (first + column)
    own = tl.zeros([block], dtype=tl.float32)
    for part in tl.static_range(parts):
        own += tl.load(x + (part * tokens + token) * x_stride + column, mask=live, other=0.0).to(tl.float32)
    own_bits = as_bits(own.to(row_type), empty, sent_for_empty, bits_type)
    if in_two_shots:
        owner = token % ranks
        if owner == rank:
            total = receive_sum(place, own_bits, live, sender_stride, row_type, rank, ranks, empty)
            if has_post_norm:
                total = rms_normed(total, post_scale, eps, dim, weight_type).to(row_type).to(tl.float32)
            total = (before + total).to(row_type)
            bits = as_bits(total, empty, sent_for_empty, bits_type)
            send_to_others(buffers, next_address, own_buffer, first, bits, live, sender_stride, column, rank, ranks)
        else:
            send(address_of(buffers, owner), own_buffer, first + rank * sender_stride + column, own_bits, live)
            total = receive(place + owner * sender_stride, live, row_type, empty)
    else:
        send_to_others(buffers, next_address, own_buffer, first, own_bits, live, sender_stride, column, rank, ranks)
        total = receive_sum(place, own_bits, live, sender_stride, row_type, rank, ranks, empty)
        if has_post_norm:
            total = rms_normed(total, post_scale, eps, dim, weight_type).to(row_type).to(tl.float32)
        total = (before + total).to(row_type)
    tl.store(turns + token, 1 - turn)
    tl.store(residual_row, total, mask=live)
    value = total.to(tl.float32)
    normed = rms_normed(value, scale, eps, dim, weight_type)
    if is_rounded:
        normed = normed.to(row_type).to(tl.float32)
        row, row_scale = rounded_row(
            normed, input_scale, limit, min_scale, out.dtype.element_ty, is_static, in_fragments, block
        )
        tl.store(out_scales + token, row_scale)
    else:
        row = normed.to(out.dtype.element_ty)
    tl.store(out + token * dim + column, row, mask=live)


def all_reduce_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    buffers: LamportBuffers,
    post_weight: Tensor | None = None,
    reader: Weight | None = None,
) -> Activations:
    if takes_rounded(reader, x.shape[-2], residual.dtype):
        return rounded_all_reduce_rms_norm(x, weight, eps, residual, buffers, post_weight, reader)
    out = torch.empty(x.shape[-2:], dtype=residual.dtype, device=x.device)
    _launch(x, weight, eps, residual, buffers, post_weight, out, None, reader)
    return out


def rounded_all_reduce_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    buffers: LamportBuffers,
    post_weight: Tensor | None,
    reader: QuantizedWeight,
) -> RoundedTokens:
    """quantize_tokens, for `reader`, of the norm. The reader has one group."""
    rounded = RoundedTokens.empty(x.shape[-2], reader, residual.dtype)
    _launch(x, weight, eps, residual, buffers, post_weight, rounded.values, rounded.scales, reader)
    return rounded


def _launch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor,
    buffers: LamportBuffers,
    post_weight: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    reader: Weight | None,
) -> None:
    """Write the norm to `out` [tokens, dim], or, with `scales` [tokens], what it is rounded to for `reader`."""
    tokens, dim = x.shape[-2:]
    parts = x.shape[0] if x.dim() == 3 else 1
    own = buffers.by_rank[buffers.rank]
    assert buffers.fit(tokens, dim)
    assert own.itemsize == residual.itemsize
    assert x.stride(-1) == residual.stride(-1) == 1
    assert parts == 1 or x.stride(0) == tokens * x.stride(1)
    assert weight.is_contiguous()
    assert post_weight is None or post_weight.is_contiguous()
    if tokens == 0:
        return
    quantized = reader if isinstance(reader, QuantizedWeight) else None
    input_scale = None if quantized is None or scales is None else quantized.input_scale
    block = next_power_of_2(dim)
    all_reduce_rms_norm_kernel[(tokens,)](
        x,
        weight,
        weight if post_weight is None else post_weight,
        residual,
        out,
        out if scales is None else scales,
        weight if input_scale is None else input_scale,
        own_buffer=own,
        buffers=buffers.addresses,
        turns=buffers.turns,
        x_stride=x.stride(-2),
        residual_stride=residual.stride(0),
        tokens=tokens,
        dim=dim,
        buffer_rows=own.shape[2],
        eps=eps,
        limit=0.0 if scales is None else LIMITS[out.dtype],
        min_scale=MIN_INPUT_SCALE,
        rank=buffers.rank,
        parts=parts,
        ranks=own.shape[1],
        in_two_shots=buffers.use_two_shots(tokens),
        has_post_norm=post_weight is not None,
        is_rounded=scales is not None,
        is_static=input_scale is not None,
        in_fragments=quantized is not None and quantized.in_fragments,
        empty=EMPTY,
        sent_for_empty=SENT_FOR_EMPTY,
        block=block,
        num_warps=min(16, max(1, block // 256)),
        **dependent_launch(x.device),
    )
