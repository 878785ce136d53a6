# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention: one new token per sequence over its whole context, in parts that run in parallel (split-KV).

Every part rotates the new token's query and key; the part that ends with the new token writes its K and V to the pool.
No part reads them back, since writes of other programs are not visible within a launch.

K and transposed V are the left operands of the two products, since they fill a tensor core's rows. The query heads that
share a KV head are the columns, padded to 8, the fewest that a tensor core takes. K and V are prefetched into shared
memory. An int8 pool has its own kernel, token_attention_int8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.attention.head_norm import HeadNorm
from lightllm_backend.kernels.attention.merge_splits import (
    LOG2_E,
    NO_WINDOW,
    TokenBlocks,
    merge_splits,
    soft_capped,
    split_buffers,
    split_count,
    split_range,
)
from lightllm_backend.kernels.attention.rotary_kv_write import load_norm, rotated
from lightllm_backend.kernels.attention.step_memo import StepMemo
from lightllm_backend.kernels.attention.token_attention_int8 import token_attention_int8
from lightllm_backend.kernels.dependent_launch import can_start_next, dependent_launch, start_next, wait_for_previous
from lightllm_backend.kernels.hardware import MIN_COLUMNS, compute_capability, multiprocessor_count
from lightllm_backend.kernels.sizes import next_power_of_2


def choose_decode_blocks(block_dim: int, element_size: int, capability: tuple[int, int], heads: int) -> TokenBlocks:
    """The tile for `heads` KV heads of all sequences together (measured in whole decode steps on an H200, at 192 and
    4,096 tokens of context).

    With many heads: small tiles of a single warp, 8 KiB of K, so that many programs share a multiprocessor and some
    read while others start. With fewer heads: larger tiles, and no dependent launch if the grid fits on a few
    multiprocessors.
    """
    if element_size == 4:
        return TokenBlocks(max(16, 4096 // block_dim), 4, 1)
    tokens = min(128, max(16, 4096 // block_dim))
    if capability < (8, 0):
        return TokenBlocks(tokens, 1, 1)
    if heads >= 2048:
        return TokenBlocks(tokens, 1, 2)
    larger = min(128, 2 * tokens)
    return TokenBlocks(larger, 2, 2, starts_early=False) if 256 <= heads < 704 else TokenBlocks(larger, 1, 2)


@triton.jit(do_not_specialize=["splits"])
def token_attention_kernel(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    k_pool,
    v_pool,
    out,
    partial,
    log_sums,
    req_to_token,
    rows,
    context_lengths,
    alibi_slopes,
    q_norm,
    k_norm,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    cos_stride,
    sin_stride,
    k_slot_stride: tl.constexpr,
    k_pool_head_stride,
    v_slot_stride: tl.constexpr,
    v_pool_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    scale_log2,
    window,
    eps,
    heads,
    splits,
    is_split: tl.constexpr,
    has_alibi: tl.constexpr,
    has_norm: tl.constexpr,
    soft_cap: tl.constexpr,
    is_dependent: tl.constexpr,
    starts_next: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    block_group: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
    stages: tl.constexpr,
):
    """Attends over one split of a context, for one KV head and the `group` query heads that share it."""
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    # What the step knows of its sequences came from the host before its first kernel.
    context = tl.load(context_lengths + sequence)
    slot_row = req_to_token + tl.load(rows + sequence).to(tl.int64) * table_stride
    new_slot = tl.load(slots + sequence).to(tl.int64)
    q_weight, q_partner_weight, k_weight, k_partner_weight = eps, eps, eps, eps  # of no use without a norm
    if has_norm:
        q_heads: tl.constexpr = block_group if group > 1 else 1
        q_weight, q_partner_weight = load_norm(q_norm, head_dim, half, q_heads, block_dim)
        k_weight, k_partner_weight = load_norm(k_norm, head_dim, half, 1, block_dim)
    start, end = split_range(context, window, split, splits, block_tokens)
    start_next(starts_next)
    wait_for_previous(is_dependent)
    if is_split and start >= end:
        return  # an empty part, which nobody reads
    # Issue all loads that a part begins with before using any of them.
    column = tl.arange(0, block_dim)
    column_live = column < head_dim
    member = tl.arange(0, block_group)
    head = kv_head * group + member
    live = (member < group)[:, None] & column_live[None, :]
    cos += sequence * cos_stride
    sin += sequence * sin_stride
    q_row = q + sequence * q_stride + kv_head * group * q_head_stride
    if group == 1:
        query = rotated(
            q_row, column, column_live, cos, sin, q_weight, q_partner_weight, eps, has_norm, head_dim, half
        ).to(q.dtype.element_ty)
        query = tl.where(live, query[None, :], 0.0).to(q.dtype.element_ty)
    else:
        q_row += member[:, None] * q_head_stride
        query = rotated(
            q_row, column[None, :], live, cos, sin, q_weight, q_partner_weight, eps, has_norm, head_dim, half
        ).to(q.dtype.element_ty)
    k_row = k + sequence * k_stride + kv_head * k_head_stride
    new_key = rotated(
        k_row, column, column_live, cos, sin, k_weight, k_partner_weight, eps, has_norm, head_dim, half
    ).to(k.dtype.element_ty)
    new_value = tl.load(v + sequence * v_stride + kv_head * v_head_stride + column, mask=column_live, other=0.0)
    if has_alibi:
        slope_log2 = tl.load(alibi_slopes + head, mask=member < group, other=0.0) * LOG2_E

    k_head = k_pool + kv_head * k_pool_head_stride + column
    v_head = v_pool + kv_head * v_pool_head_stride + column
    has_new = (start < end) & (end == context)
    written = column < tl.where(has_new & (new_slot >= 0), head_dim, 0)
    tl.store(k_head + new_slot * k_slot_stride, new_key, mask=written)
    tl.store(v_head + new_slot * v_slot_stride, new_value, mask=written)
    new_score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale_log2
    new_score = soft_capped(new_score, soft_cap)
    maximum = tl.where(has_new, new_score, float("-inf"))
    # The sum of weights, kept per token of a block until the end.
    is_first = tl.arange(0, block_tokens)[:, None] == 0
    total = tl.zeros([block_tokens, block_group], dtype=tl.float32)
    total += tl.where(is_first, tl.where(has_new, 1.0, 0.0), 0.0)
    accumulator = tl.zeros([block_dim, block_group], dtype=tl.float32)
    accumulator += tl.where(has_new, new_value.to(tl.float32), 0.0)[:, None]
    element: tl.constexpr = k_pool.dtype.element_ty
    k_bytes = (k_pool + kv_head * k_pool_head_stride).to(tl.pointer_type(tl.int8))
    v_bytes = (v_pool + kv_head * v_pool_head_stride).to(tl.pointer_type(tl.int8))
    k_slot_bytes: tl.constexpr = k_slot_stride * element.primitive_bitwidth // 8
    v_slot_bytes: tl.constexpr = v_slot_stride * element.primitive_bitwidth // 8
    end -= has_new.to(tl.int32)
    for first in tl.range(start, end, block_tokens, num_stages=stages):
        token = first + tl.arange(0, block_tokens)
        token_live = token < end
        # To save instructions, the last token is read again behind the end, and an address is one unsigned product.
        slot = tl.load(slot_row + tl.minimum(token, end - 1)).to(tl.uint32).to(tl.uint64)
        key_rows = (k_bytes + (slot * k_slot_bytes)[:, None]).to(tl.pointer_type(element)) + column[None, :]
        value_columns = (v_bytes + (slot * v_slot_bytes)[None, :]).to(tl.pointer_type(element)) + column[:, None]
        if head_dim == block_dim:
            key, value = tl.load(key_rows), tl.load(value_columns)
        else:
            key = tl.load(key_rows, mask=column_live[None, :], other=0.0)
            value = tl.load(value_columns, mask=column_live[:, None], other=0.0)
        score = soft_capped(tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2, soft_cap)
        if has_alibi:
            score += slope_log2[None, :] * (token - (context - 1)).to(tl.float32)[:, None]
        score = tl.where(token_live[:, None], score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 0))
        weight = tl.exp2(score - new_maximum[None, :])
        correction = tl.exp2(maximum - new_maximum)[None, :]
        total = total * correction + weight
        accumulator = tl.dot(value, weight.to(value.dtype), accumulator * correction, input_precision="ieee")
        maximum = new_maximum

    # The results of an empty part are not read. A padding row of `out` is not written.
    total = tl.sum(total, 0)
    divisor = tl.where(total > 0, total, 1.0)
    result = tl.trans(accumulator * (1.0 / divisor)[None, :])
    if is_split:
        index = (sequence * heads + head) * splits + split
        tl.store(partial + index[:, None] * head_dim + column[None, :], result, mask=live)
        tl.store(log_sums + index, maximum + tl.log2(divisor), mask=member < group)
    else:
        address = out + sequence * out_stride + head[:, None] * out_head_stride + column[None, :]
        written = (member < tl.where(context > 0, group, 0))[:, None] & column_live[None, :]
        tl.store(address, result.to(out.dtype.element_ty), mask=written)


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    context_lengths: Tensor,
    max_context_length: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    scales: Tensor | None = None,
    out: Tensor | None = None,
    memo: StepMemo | None = None,
    norm: HeadNorm | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    if scales is not None:
        table = (req_to_token, rows, context_lengths, max_context_length)
        new = (q, k, v, cos, sin, slots)
        return token_attention_int8(
            *new, k_pool, v_pool, scales, *table, scale, alibi_slopes, window, out, memo, norm, soft_cap
        )
    sequences, heads, head_dim = q.shape
    kv_heads = k_pool.shape[1]
    assert k_pool.dtype == v_pool.dtype == q.dtype
    assert all(x.stride(2) == 1 for x in (q, k, v, k_pool, v_pool))
    assert cos.stride(1) == sin.stride(1) == 1
    assert 2 * cos.shape[1] <= head_dim
    assert req_to_token.stride(1) == 1
    assert heads % kv_heads == 0
    assert max_context_length <= req_to_token.shape[1]
    if out is None:
        out = torch.zeros((sequences, heads, head_dim), dtype=q.dtype, device=q.device)
    if sequences == 0:
        return out
    group = heads // kv_heads
    longest = min(max_context_length, window) if window else max_context_length
    block_dim = max(16, next_power_of_2(head_dim))
    capability = compute_capability(q.device)
    blocks = choose_decode_blocks(block_dim, q.element_size(), capability, sequences * kv_heads)
    splits = split_count(sequences * kv_heads, longest, multiprocessor_count(q.device), blocks.num_warps)
    partial, log_sums = split_buffers(out, splits)
    token_attention_kernel[(kv_heads, sequences, splits)](
        q,
        k,
        v,
        cos,
        sin,
        slots,
        k_pool,
        v_pool,
        out,
        partial,
        log_sums,
        req_to_token,
        rows,
        context_lengths,
        q if alibi_slopes is None else alibi_slopes,
        q if norm is None else norm.q,
        k if norm is None else norm.k,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos.stride(0),
        sin.stride(0),
        k_pool.stride(0),
        k_pool.stride(1),
        v_pool.stride(0),
        v_pool.stride(1),
        out.stride(0),
        out.stride(1),
        req_to_token.stride(0),
        scale * LOG2_E.value,
        window or NO_WINDOW,
        0.0 if norm is None else norm.eps,
        heads,
        splits,
        is_split=splits > 1,
        has_alibi=alibi_slopes is not None,
        has_norm=norm is not None,
        soft_cap=soft_cap,
        group=group,
        head_dim=head_dim,
        half=cos.shape[1],
        block_group=max(MIN_COLUMNS, next_power_of_2(group)),
        block_tokens=blocks.tokens,
        block_dim=block_dim,
        stages=blocks.num_stages,
        num_warps=blocks.num_warps,
        starts_next=not blocks.starts_early and can_start_next(q.device),
        **dependent_launch(q.device, blocks.starts_early),
    )
    if splits == 1:
        return out
    return merge_splits(partial, log_sums, context_lengths, window, blocks.tokens, out)
