# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Causal flash attention of packed new tokens over K and V in the pool."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.hardware import compute_capability
from lightllm_backend.kernels.kv_scales import scale_arguments

LOG2_E = tl.constexpr(math.log2(math.e))


class PrefillBlocks(NamedTuple):
    queries: int
    tokens: int
    num_warps: int
    num_stages: int


def choose_blocks(
    head_dim: int, element_size: int, capability: tuple[int, int], max_query_length: int
) -> PrefillBlocks:
    """Tiles that fit the shared memory: `num_stages` of K and V, and the queries where they are an operand in it."""
    if element_size == 4:
        # Without tensor cores the tiles live in registers.
        blocks = PrefillBlocks(32, 32, 4, 1)
    elif capability < (8, 0):
        blocks = PrefillBlocks(64, 32, 4, 1) if head_dim <= 128 else PrefillBlocks(32, 16, 4, 1)
    elif head_dim > 128:
        blocks = PrefillBlocks(64, 32, 4, 2)
    elif capability < (9, 0) or head_dim <= 64:
        blocks = PrefillBlocks(128, 64, 4 if head_dim <= 64 else 8, 2)
    else:
        blocks = PrefillBlocks(128, 64, 8, 3)
    queries = min(blocks.queries, max(16, triton.next_power_of_2(max_query_length)))
    return blocks._replace(queries=queries, num_warps=4 if queries < 128 else blocks.num_warps)


@triton.jit
def _attend(
    accumulator,
    maximum,
    total,
    query,
    position,
    slot_row,
    k_head,
    v_head,
    k_slot_stride,
    v_slot_stride,
    k_scale_head,
    v_scale_head,
    k_scale_stride,
    v_scale_stride,
    start,
    end,
    scale_log2,
    slope_log2,
    origin,
    window,
    head_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
    has_alibi: tl.constexpr,
    has_window: tl.constexpr,
    is_quantized: tl.constexpr,
    is_masked: tl.constexpr,
):
    """Online softmax over the tokens from `start` to `end`; all of them are seen by all queries unless it is masked."""
    column = tl.arange(0, block_dim)
    for first in range(start, end, block_tokens):
        token = first + tl.arange(0, block_tokens)
        live = token < end
        if is_masked:
            slot = tl.load(slot_row + token, mask=live, other=0).to(tl.int64)
            kv_live = live[:, None] & (column < head_dim)[None, :]
        else:
            slot = tl.load(slot_row + token).to(tl.int64)
            kv_live = (column < head_dim)[None, :]
        key = tl.load(k_head + slot[:, None] * k_slot_stride + column[None, :], mask=kv_live, other=0.0)
        score = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        if is_quantized:
            k_scale = tl.load(k_scale_head + slot * k_scale_stride, mask=live, other=1.0).to(tl.float32)
            v_scale = tl.load(v_scale_head + slot * v_scale_stride, mask=live, other=1.0).to(tl.float32)
            # V's scale is part of the weights, and the greatest is 1 with it: float16 could not hold them otherwise.
            score = score * (k_scale * scale_log2)[None, :] + tl.log2(v_scale)[None, :]
        else:
            score *= scale_log2
        if has_alibi:
            score += (slope_log2 * (token - origin).to(tl.float32))[None, :]
        if is_masked:
            seen = live[None, :] & (token[None, :] <= position[:, None])
            if has_window:
                seen = seen & (token[None, :] > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        if is_quantized:
            total = total * correction + tl.sum(weight * (1.0 / v_scale)[None, :], 1)
        else:
            total = total * correction + tl.sum(weight, 1)
        value = tl.load(v_head + slot[:, None] * v_slot_stride + column[None, :], mask=kv_live, other=0.0)
        accumulator = accumulator * correction[:, None]
        weight = weight.to(query.dtype)
        accumulator = tl.dot(weight, value.to(query.dtype), accumulator, input_precision="ieee")
        maximum = new_maximum
    return accumulator, maximum, total


@triton.jit
def prefill_attention_kernel(
    q,
    k_pool,
    v_pool,
    out,
    req_to_token,
    rows,
    query_starts,
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
    has_alibi: tl.constexpr,
    has_window: tl.constexpr,
    is_quantized: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_queries: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One block of a sequence's queries, one head."""
    # The last blocks of a prompt have the most to do and are started first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    query_start = tl.load(query_starts + sequence)
    query_length = tl.load(query_starts + sequence + 1) - query_start
    if block * block_queries < query_length:
        context = tl.load(context_lengths + sequence)
        slot_row = req_to_token + tl.load(rows + sequence).to(tl.int64) * table_stride
        k_head = k_pool + (head // group) * k_head_stride
        v_head = v_pool + (head // group) * v_head_stride
        k_scale_head = k_scales + head // group
        v_scale_head = v_scales + head // group
        slope_log2 = 0.0
        if has_alibi:
            slope_log2 = tl.load(alibi_slopes + head) * LOG2_E

        index = block * block_queries + tl.arange(0, block_queries)
        column = tl.arange(0, block_dim)
        live = (index < query_length)[:, None] & (column < head_dim)[None, :]
        token = (query_start + index).to(tl.int64)
        query = tl.load(
            q + token[:, None] * q_stride + head * q_head_stride + column[None, :],
            mask=live,
            other=0.0,
        )
        first_position = context - query_length + block * block_queries
        position = context - query_length + index
        # Whole blocks of tokens that every query sees lie between those that hold the window's edges and the diagonal.
        start = 0
        inner = 0
        diagonal = (first_position + 1) // block_tokens * block_tokens
        end = tl.minimum(context, first_position + block_queries)
        if has_window:
            start = tl.maximum(first_position + 1 - window, 0) // block_tokens * block_tokens
            inner = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), block_tokens) * block_tokens, diagonal)

        accumulator = tl.zeros([block_queries, block_dim], dtype=tl.float32)
        # Finite, because the first blocks may show a query nothing.
        maximum = tl.full([block_queries], -3.0e38, dtype=tl.float32)
        total = tl.zeros([block_queries], dtype=tl.float32)
        if has_window:
            accumulator, maximum, total = _attend(
                accumulator, maximum, total, query, position, slot_row, k_head, v_head, k_slot_stride, v_slot_stride,
                k_scale_head, v_scale_head, k_scale_stride, v_scale_stride, start, inner, scale_log2, slope_log2,
                first_position, window, head_dim, block_tokens, block_dim, has_alibi, has_window, is_quantized, True,
            )  # fmt: skip
        accumulator, maximum, total = _attend(
            accumulator, maximum, total, query, position, slot_row, k_head, v_head, k_slot_stride, v_slot_stride,
            k_scale_head, v_scale_head, k_scale_stride, v_scale_stride, inner, diagonal, scale_log2, slope_log2,
            first_position, window, head_dim, block_tokens, block_dim, has_alibi, has_window, is_quantized, False,
        )  # fmt: skip
        accumulator, maximum, total = _attend(
            accumulator, maximum, total, query, position, slot_row, k_head, v_head, k_slot_stride, v_slot_stride,
            k_scale_head, v_scale_head, k_scale_stride, v_scale_stride, diagonal, end, scale_log2, slope_log2,
            first_position, window, head_dim, block_tokens, block_dim, has_alibi, has_window, is_quantized, True,
        )  # fmt: skip
        # Rows behind the last query may have seen nothing.
        tl.store(
            out + token[:, None] * out_stride + head * out_head_stride + column[None, :],
            (accumulator / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty),
            mask=live,
        )


def prefill_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    max_query_length: int,
    max_context_length: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    tokens, heads, head_dim = q.shape
    sequences, kv_heads = rows.shape[0], k_pool.shape[1]
    assert all(x.stride(2) == 1 for x in (q, k_pool, v_pool))
    assert req_to_token.stride(1) == 1
    assert heads % kv_heads == 0
    assert max_context_length <= req_to_token.shape[1]
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if sequences == 0 or max_query_length == 0:
        return out
    k_scales, v_scales, is_quantized = scale_arguments(k_pool, k_scales, v_scales)
    blocks = choose_blocks(head_dim, q.element_size(), compute_capability(q.device), max_query_length)
    grid = (triton.cdiv(max_query_length, blocks.queries), heads, sequences)
    prefill_attention_kernel[grid](
        q,
        k_pool,
        v_pool,
        out,
        req_to_token,
        rows,
        query_starts,
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
        window,
        has_alibi=alibi_slopes is not None,
        has_window=window > 0,
        is_quantized=is_quantized,
        group=heads // kv_heads,
        head_dim=head_dim,
        block_queries=blocks.queries,
        block_tokens=blocks.tokens,
        block_dim=max(16, triton.next_power_of_2(head_dim)),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return out
