# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention where each query head has K and V of its own, so that there is nothing to share but bandwidth.

Each of the `block_tokens` lanes keeps an online softmax of its own (its maximum, its sum, its weighted V) over every
block_tokens-th token, and they are joined once, at the end: nothing is exchanged between threads while K and V stream
in, and the slots of the next tokens are on their way before they are needed.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.hardware import multiprocessor_count
from lightllm_backend.kernels.kv_scales import scale_arguments
from lightllm_backend.kernels.merge_splits import merge_splits, split_buffers, split_count

# Longer than any context.
_NO_WINDOW = 2**31 - 1

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def token_attention_mha_kernel(
    q,
    k_pool,
    v_pool,
    out,
    partial,
    log_sums,
    req_to_token,
    rows,
    context_lengths,
    alibi_slopes,
    k_scales,
    v_scales,
    q_stride,
    q_head_stride,
    k_slot_stride,
    k_head_stride,
    v_slot_stride,
    v_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    k_scale_stride,
    v_scale_stride,
    scale_log2,
    window,
    splits,
    is_split: tl.constexpr,
    has_alibi: tl.constexpr,
    is_quantized: tl.constexpr,
    head_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One split of a sequence's context, for one head."""
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    context = tl.load(context_lengths + sequence)
    seen_from = tl.maximum(context - window, 0)
    length = tl.cdiv(tl.cdiv(context - seen_from, block_tokens), splits) * block_tokens
    start = seen_from + split * length
    end = tl.minimum(context, start + length)

    lane = tl.arange(0, block_tokens)
    column = tl.arange(0, block_dim)
    column_live = column < head_dim
    slot_row = req_to_token + tl.load(rows + sequence).to(tl.int64) * table_stride
    k_head = k_pool + head * k_head_stride + column[None, :]
    v_head = v_pool + head * v_head_stride + column[None, :]
    query = tl.load(q + sequence * q_stride + head * q_head_stride + column, mask=column_live, other=0.0)
    query = query.to(tl.float32) * scale_log2
    if has_alibi:
        slope_log2 = tl.load(alibi_slopes + head) * LOG2_E

    maximum = tl.full([block_tokens], -1.0e30, dtype=tl.float32)
    total = tl.zeros([block_tokens], dtype=tl.float32)
    accumulator = tl.zeros([block_tokens, block_dim], dtype=tl.float32)
    next_slot = tl.load(slot_row + start + lane, mask=start + lane < end, other=0)
    for first in range(start, end, block_tokens):
        token = first + lane
        live = token < end
        slot = next_slot.to(tl.int64)
        next_slot = tl.load(slot_row + token + block_tokens, mask=token + block_tokens < end, other=0)
        kv_live = live[:, None] & column_live[None, :]
        key = tl.load(k_head + slot[:, None] * k_slot_stride, mask=kv_live, other=0.0).to(tl.float32)
        value = tl.load(v_head + slot[:, None] * v_slot_stride, mask=kv_live, other=0.0).to(tl.float32)
        score = tl.sum(query[None, :] * key, 1)
        if is_quantized:
            score *= tl.load(k_scales + slot * k_scale_stride + head, mask=live, other=1.0).to(tl.float32)
        if has_alibi:
            score += slope_log2 * (token - (context - 1)).to(tl.float32)
        score = tl.where(live, score, float("-inf"))
        new_maximum = tl.maximum(maximum, score)
        weight = tl.exp2(score - new_maximum)
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + weight
        if is_quantized:
            weight *= tl.load(v_scales + slot * v_scale_stride + head, mask=live, other=1.0).to(tl.float32)
        accumulator = accumulator * correction[:, None] + weight[:, None] * value
        maximum = new_maximum

    # Lanes that saw nothing have a total of 0. If all did, the result is zeros, with a log sum of -inf.
    joint_maximum = tl.max(maximum, 0)
    share = tl.exp2(maximum - joint_maximum)
    joint_total = tl.sum(total * share, 0)
    divisor = tl.where(joint_total > 0, joint_total, 1.0)
    result = tl.sum(accumulator * share[:, None], 0) / divisor
    if is_split:
        index = (sequence * tl.num_programs(0) + head) * splits + split
        tl.store(partial + index * head_dim + column, result, mask=column_live)
        tl.store(log_sums + index, tl.where(joint_total > 0, joint_maximum + tl.log2(divisor), float("-inf")))
    else:
        address = out + sequence * out_stride + head * out_head_stride + column
        tl.store(address, result.to(out.dtype.element_ty), mask=column_live)


def token_attention_mha(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    context_lengths: Tensor,
    max_context_length: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    sequences, heads, head_dim = q.shape
    assert k_pool.shape[1] == heads
    assert all(x.stride(2) == 1 for x in (q, k_pool, v_pool))
    assert req_to_token.stride(1) == 1
    assert max_context_length <= req_to_token.shape[1]
    out = torch.empty((sequences, heads, head_dim), dtype=q.dtype, device=q.device)
    if sequences == 0:
        return out
    k_scales, v_scales, is_quantized = scale_arguments(k_pool, k_scales, v_scales)
    longest = min(max_context_length, window) if window else max_context_length
    splits = split_count(sequences * heads, longest, multiprocessor_count(q.device))
    partial, log_sums = split_buffers(out, splits)
    block_dim = max(16, triton.next_power_of_2(head_dim))
    token_attention_mha_kernel[(heads, sequences, splits)](
        q,
        k_pool,
        v_pool,
        out,
        partial,
        log_sums,
        req_to_token,
        rows,
        context_lengths,
        q if alibi_slopes is None else alibi_slopes,
        k_scales,
        v_scales,
        q.stride(0),
        q.stride(1),
        k_pool.stride(0),
        k_pool.stride(1),
        v_pool.stride(0),
        v_pool.stride(1),
        out.stride(0),
        out.stride(1),
        req_to_token.stride(0),
        k_scales.stride(0),
        v_scales.stride(0),
        scale * LOG2_E.value,
        window or _NO_WINDOW,
        splits,
        is_split=splits > 1,
        has_alibi=alibi_slopes is not None,
        is_quantized=is_quantized,
        head_dim=head_dim,
        block_tokens=max(8, 4096 // block_dim),  # 64 values of K a thread
        block_dim=block_dim,
        num_warps=2,
        num_stages=1,
    )
    return merge_splits(partial, log_sums, q.dtype) if splits > 1 else out
