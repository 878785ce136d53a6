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
    start,
    end,
    scale_log2,
    head_dim: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
    is_masked: tl.constexpr,
):
    """Online softmax over the tokens from `start` to `end`; all of them are seen by all queries unless it is masked."""
    column = tl.arange(0, block_dim)
    for first in range(start, end, block_tokens):
        token = first + tl.arange(0, block_tokens)
        if is_masked:
            live = token < end
            slot = tl.load(slot_row + token, mask=live, other=0).to(tl.int64)
            kv_live = live[:, None] & (column < head_dim)[None, :]
        else:
            slot = tl.load(slot_row + token).to(tl.int64)
            kv_live = (column < head_dim)[None, :]
        key = tl.load(k_head + slot[:, None] * k_slot_stride + column[None, :], mask=kv_live, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        if is_masked:
            score = tl.where(live[None, :] & (token[None, :] <= position[:, None]), score, float("-inf"))
        # The first token of a sequence is seen by every query, so the maximum is finite from the first block on.
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + tl.sum(weight, 1)
        value = tl.load(v_head + slot[:, None] * v_slot_stride + column[None, :], mask=kv_live, other=0.0)
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(weight.to(value.dtype), value, accumulator, input_precision="ieee")
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
    q_stride,
    q_head_stride,
    k_slot_stride,
    k_head_stride,
    v_slot_stride,
    v_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    scale_log2,
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
        seen_by_all = (first_position + 1) // block_tokens * block_tokens
        end = tl.minimum(context, first_position + block_queries)

        accumulator = tl.zeros([block_queries, block_dim], dtype=tl.float32)
        maximum = tl.full([block_queries], float("-inf"), dtype=tl.float32)
        total = tl.zeros([block_queries], dtype=tl.float32)
        accumulator, maximum, total = _attend(
            accumulator, maximum, total, query, position, slot_row, k_head, v_head, k_slot_stride, v_slot_stride,
            0, seen_by_all, scale_log2, head_dim, block_tokens, block_dim, False,
        )  # fmt: skip
        accumulator, maximum, total = _attend(
            accumulator, maximum, total, query, position, slot_row, k_head, v_head, k_slot_stride, v_slot_stride,
            seen_by_all, end, scale_log2, head_dim, block_tokens, block_dim, True,
        )  # fmt: skip
        tl.store(
            out + token[:, None] * out_stride + head * out_head_stride + column[None, :],
            (accumulator / total[:, None]).to(out.dtype.element_ty),
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
        q.stride(0),
        q.stride(1),
        k_pool.stride(0),
        k_pool.stride(1),
        v_pool.stride(0),
        v_pool.stride(1),
        out.stride(0),
        out.stride(1),
        req_to_token.stride(0),
        scale * math.log2(math.e),
        group=heads // kv_heads,
        head_dim=head_dim,
        block_queries=blocks.queries,
        block_tokens=blocks.tokens,
        block_dim=max(16, triton.next_power_of_2(head_dim)),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return out
