# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention: one query token of each sequence over its whole context, in parts that run side by side.

Query heads that share K and V are computed together, on tensor cores; where none do, token_attention_mha takes over.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.hardware import compute_capability, multiprocessor_count
from lightllm_backend.kernels.kv_scales import scale_arguments
from lightllm_backend.kernels.merge_splits import merge_splits, split_buffers, split_count
from lightllm_backend.kernels.token_attention_mha import token_attention_mha

# Longer than any context.
_NO_WINDOW = 2**31 - 1

LOG2_E = tl.constexpr(math.log2(math.e))


class TokenBlocks(NamedTuple):
    tokens: int
    num_warps: int
    num_stages: int


def choose_blocks(block_dim: int, element_size: int, capability: tuple[int, int]) -> TokenBlocks:
    """Tiles of K and V of 16 KiB each as they are computed with, in as many stages as the shared memory takes."""
    tokens = min(128, max(16, 16384 // (block_dim * element_size)))
    if capability < (8, 0):
        return TokenBlocks(tokens, 4, 1)
    return TokenBlocks(tokens, 4, 2)


@triton.jit
def token_attention_kernel(
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
    heads,
    splits,
    is_split: tl.constexpr,
    has_alibi: tl.constexpr,
    is_quantized: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_group: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One split of a sequence's context, one KV head and the `group` query heads that share it."""
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    context = tl.load(context_lengths + sequence)
    seen_from = tl.maximum(context - window, 0)
    length = tl.cdiv(tl.cdiv(context - seen_from, block_tokens), splits) * block_tokens
    start = seen_from + split * length
    end = tl.minimum(context, start + length)

    slot_row = req_to_token + tl.load(rows + sequence).to(tl.int64) * table_stride
    k_head = k_pool + kv_head * k_head_stride
    v_head = v_pool + kv_head * v_head_stride
    column = tl.arange(0, block_dim)
    member = tl.arange(0, block_group)
    head = kv_head * group + member
    live = (member < group)[:, None] & (column < head_dim)[None, :]
    query = tl.load(q + sequence * q_stride + head[:, None] * q_head_stride + column[None, :], mask=live, other=0.0)
    if has_alibi:
        slope_log2 = tl.load(alibi_slopes + head, mask=member < group, other=0.0) * LOG2_E

    accumulator = tl.zeros([block_group, block_dim], dtype=tl.float32)
    maximum = tl.full([block_group], float("-inf"), dtype=tl.float32)
    total = tl.zeros([block_group], dtype=tl.float32)
    for first in range(start, end, block_tokens):
        token = first + tl.arange(0, block_tokens)
        token_live = token < end
        slot = tl.load(slot_row + token, mask=token_live, other=0).to(tl.int64)
        kv_live = token_live[:, None] & (column < head_dim)[None, :]
        key = tl.load(k_head + slot[:, None] * k_slot_stride + column[None, :], mask=kv_live, other=0.0)
        value = tl.load(v_head + slot[:, None] * v_slot_stride + column[None, :], mask=kv_live, other=0.0)
        score = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        if is_quantized:
            k_scale = tl.load(k_scales + slot * k_scale_stride + kv_head, mask=token_live, other=1.0).to(tl.float32)
            v_scale = tl.load(v_scales + slot * v_scale_stride + kv_head, mask=token_live, other=1.0).to(tl.float32)
            # V's scale is part of the weights, and the greatest is 1 with it: float16 could not hold them otherwise.
            score = score * (k_scale * scale_log2)[None, :] + tl.log2(v_scale)[None, :]
        else:
            score *= scale_log2
        if has_alibi:
            score += slope_log2[:, None] * (token - (context - 1)).to(tl.float32)[None, :]
        score = tl.where(token_live[None, :], score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        if is_quantized:
            total = total * correction + tl.sum(weight * (1.0 / v_scale)[None, :], 1)
        else:
            total = total * correction + tl.sum(weight, 1)
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(weight.to(query.dtype), value.to(query.dtype), accumulator, input_precision="ieee")
        maximum = new_maximum

    # Nothing was seen by an empty split, or in a padding row: zeros, with a log sum of -inf.
    divisor = tl.where(total > 0, total, 1.0)
    result = accumulator / divisor[:, None]
    if is_split:
        index = (sequence * heads + head) * splits + split
        tl.store(partial + index[:, None] * head_dim + column[None, :], result, mask=live)
        tl.store(log_sums + index, maximum + tl.log2(divisor), mask=member < group)
    else:
        address = out + sequence * out_stride + head[:, None] * out_head_stride + column[None, :]
        tl.store(address, result.to(out.dtype.element_ty), mask=live)


def token_attention(
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
    kv_heads = k_pool.shape[1]
    if heads == kv_heads:
        return token_attention_mha(
            q, k_pool, v_pool, req_to_token, rows, context_lengths, max_context_length, scale,
            alibi_slopes, window, k_scales, v_scales,
        )  # fmt: skip
    assert all(x.stride(2) == 1 for x in (q, k_pool, v_pool))
    assert req_to_token.stride(1) == 1
    assert heads % kv_heads == 0
    assert max_context_length <= req_to_token.shape[1]
    out = torch.empty((sequences, heads, head_dim), dtype=q.dtype, device=q.device)
    if sequences == 0:
        return out
    k_scales, v_scales, is_quantized = scale_arguments(k_pool, k_scales, v_scales)
    group = heads // kv_heads
    longest = min(max_context_length, window) if window else max_context_length
    splits = split_count(sequences * kv_heads, longest, multiprocessor_count(q.device))
    partial, log_sums = split_buffers(out, splits)
    block_dim = max(16, triton.next_power_of_2(head_dim))
    blocks = choose_blocks(block_dim, q.element_size(), compute_capability(q.device))
    token_attention_kernel[(kv_heads, sequences, splits)](
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
        heads,
        splits,
        is_split=splits > 1,
        has_alibi=alibi_slopes is not None,
        is_quantized=is_quantized,
        group=group,
        head_dim=head_dim,
        block_group=max(16, triton.next_power_of_2(group)),
        block_tokens=blocks.tokens,
        block_dim=block_dim,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return merge_splits(partial, log_sums, q.dtype) if splits > 1 else out
