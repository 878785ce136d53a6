# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Causal flash attention of new tokens: first over their sequences' cached tokens, then over each other.

New K and V are read where they were computed, contiguous, rather than through the pool's slots. Hopper copies them by
TMA descriptors, a tile at a time. Prompts without cached tokens have a kernel of their own on Hopper,
prefill_attention_hopper.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.attention.kv_scales import scale_pairs
from lightllm_backend.kernels.attention.merge_splits import LOG2_E
from lightllm_backend.kernels.attention.prefill_loops import attend_cached, attend_new, find_tile
from lightllm_backend.kernels.attention.step_memo import StepMemo
from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import TensorDescriptor, compute_capability, has_descriptors
from lightllm_backend.kernels.sizes import next_power_of_2

try:
    from lightllm_backend.kernels.attention import prefill_attention_hopper as hopper
except (ImportError, AttributeError):  # Triton-lang has no Gluon, or another one
    hopper = None  # type: ignore[assignment]


class PrefillBlocks(NamedTuple):
    queries: int
    tokens: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread, so that more programs fit a multiprocessor


def choose_prefill_blocks(
    head_dim: int, element_size: int, capability: tuple[int, int], mean_length: float
) -> PrefillBlocks:
    """Tiles that fit the shared memory, which holds `num_stages` of K and V, and the queries if they are an operand.

    On Hopper, short prompts run faster in many small programs, long prompts in large ones (measured on an H200).
    """
    if element_size == 4:
        # Without tensor cores, tiles live in registers.
        return PrefillBlocks(32, 32, 4, 1)
    if capability < (8, 0):
        return PrefillBlocks(64, 32, 4, 1) if head_dim <= 128 else PrefillBlocks(32, 16, 4, 1)
    if head_dim > 128:
        return PrefillBlocks(64, 32, 4, 2)
    if capability < (9, 0):
        return PrefillBlocks(64, 64, 4, 2)
    if mean_length < 512:
        return PrefillBlocks(64, 32, 4, 2, 128)
    return PrefillBlocks(64, 64, 4, 3) if mean_length < 4096 else PrefillBlocks(128, 64, 8, 2, 128)


@triton.jit(do_not_specialize=["sequences", "min_cached"], do_not_specialize_on_alignment=["rows", "context_lengths"])
def prefill_attention_kernel(
    q,
    k,
    v,
    k_tiles,
    v_tiles,
    k_pool,
    v_pool,
    out,
    req_to_token,
    rows,
    query_starts,
    context_lengths,
    alibi_slopes,
    scales,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    k_slot_stride,
    k_pool_head_stride,
    v_slot_stride,
    v_pool_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    scale_stride,
    sequences,
    min_cached,
    scale_log2,
    window,
    has_alibi: tl.constexpr,
    has_window: tl.constexpr,
    soft_cap: tl.constexpr,
    is_quantized: tl.constexpr,
    has_tiles: tl.constexpr,
    is_dependent: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_queries: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
    stages: tl.constexpr,
):
    """One block of a sequence's queries, one head; skips sequences with fewer cached tokens than `min_cached`."""
    head = tl.program_id(0)
    # The last blocks of a prompt see the most keys and start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    # What the step knows of its sequences came from the host before its first kernel.
    sequence, block, query_start = find_tile(tile, query_starts, sequences, block_queries)
    query_length = tl.load(query_starts + sequence + 1) - query_start
    cached = tl.load(context_lengths + sequence) - query_length
    row = tl.load(rows + sequence).to(tl.int64)
    wait_for_previous(is_dependent)
    if (block * block_queries < query_length) & (cached >= min_cached):
        slope_log2 = 0.0
        if has_alibi:
            slope_log2 = tl.load(alibi_slopes + head) * LOG2_E

        # Indices of new tokens, from the sequence's first.
        origin = block * block_queries
        index = origin + tl.arange(0, block_queries)
        column = tl.arange(0, block_dim)
        live = (index < query_length)[:, None] & (column < head_dim)[None, :]
        token = (query_start + index).to(tl.int64)
        query = tl.load(
            q + token[:, None] * q_stride + head * q_head_stride + column[None, :],
            mask=live,
            other=0.0,
        )
        accumulator = tl.zeros([block_queries, block_dim], dtype=tl.float32)
        # Finite, since a query may see nothing in the first blocks.
        maximum = tl.full([block_queries], -3.0e38, dtype=tl.float32)
        total = tl.zeros([block_queries], dtype=tl.float32)

        if cached > 0:
            slot_row = req_to_token + row * table_stride
            k_head = k_pool + (head // group) * k_pool_head_stride
            v_head = v_pool + (head // group) * v_pool_head_stride
            start = 0
            if has_window:
                start = tl.maximum(cached + origin + 1 - window, 0)
            accumulator, maximum, total = attend_cached(
                accumulator, maximum, total, query, cached + index, slot_row, k_head, v_head, k_slot_stride,
                v_slot_stride, scales + head // group, scale_stride, start, cached, scale_log2, slope_log2,
                cached + origin, window, head_dim, block_tokens, block_dim, has_alibi, has_window, is_quantized,
                soft_cap, stages,
            )  # fmt: skip

        # Between the blocks with the window's edges and those with the diagonal lie blocks that every query sees whole.
        k_head = k + query_start.to(tl.int64) * k_stride + (head // group) * k_head_stride
        v_head = v + query_start.to(tl.int64) * v_stride + (head // group) * v_head_stride
        inner = 0
        diagonal = (origin + 1) // block_tokens * block_tokens
        end = tl.minimum(query_length, origin + block_queries)
        tile_column = (head // group) * head_dim
        if has_window:
            start = tl.maximum(origin + 1 - window, 0) // block_tokens * block_tokens
            inner = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), block_tokens) * block_tokens, diagonal)
            accumulator, maximum, total = attend_new(
                accumulator, maximum, total, query, index, k_head, v_head, k_stride, v_stride, k_tiles, v_tiles,
                query_start, tile_column, start, inner, scale_log2, slope_log2, origin, window, head_dim, block_tokens,
                block_dim, has_alibi, has_window, True, True, has_tiles, soft_cap, stages,
            )  # fmt: skip
        accumulator, maximum, total = attend_new(
            accumulator, maximum, total, query, index, k_head, v_head, k_stride, v_stride, k_tiles, v_tiles,
            query_start, tile_column, inner, diagonal, scale_log2, slope_log2, origin, window, head_dim, block_tokens,
            block_dim, has_alibi, has_window, False, True, has_tiles, soft_cap, stages,
        )  # fmt: skip
        whole = tl.minimum(tl.cdiv(end, block_tokens), query_length // block_tokens) * block_tokens
        accumulator, maximum, total = attend_new(
            accumulator, maximum, total, query, index, k_head, v_head, k_stride, v_stride, k_tiles, v_tiles,
            query_start, tile_column, diagonal, whole, scale_log2, slope_log2, origin, window, head_dim, block_tokens,
            block_dim, has_alibi, has_window, True, True, has_tiles, soft_cap, stages,
        )  # fmt: skip
        # At most one block, the sequence's last.
        accumulator, maximum, total = attend_new(
            accumulator, maximum, total, query, index, k_head, v_head, k_stride, v_stride, k_tiles, v_tiles,
            query_start, tile_column, whole, end, scale_log2, slope_log2, origin, window, head_dim, block_tokens,
            block_dim, has_alibi, has_window, True, False, has_tiles, soft_cap, 1,
        )  # fmt: skip
        # Rows behind the last query may see nothing.
        norm = 1.0 / tl.where(total > 0, total, 1.0)
        tl.store(
            out + token[:, None] * out_stride + head * out_head_stride + column[None, :],
            (accumulator * norm[:, None]).to(out.dtype.element_ty),
            mask=live,
        )


def tiles(x: Tensor, block_tokens: int) -> Any:
    """A TMA descriptor for tiles [block_tokens, head_dim] of `x` [tokens, heads, head_dim]; None if unsupported."""
    tokens, heads, head_dim = x.shape
    is_tile = head_dim in (64, 128) and x.stride(1) == head_dim and x.element_size() == 2
    if not (is_tile and has_descriptors(x)):
        return None
    return TensorDescriptor(x, [tokens, heads * head_dim], [x.stride(0), 1], [block_tokens, head_dim])


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    context_lengths: Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    scales: Tensor | None = None,
    whole_prompts: WholePromptTiles | None = None,
    out: Tensor | None = None,
    memo: StepMemo | None = None,  # noqa: ARG001 - of the reference
    soft_cap: float = 0.0,
) -> Tensor:
    tokens, heads, head_dim = q.shape
    sequences, kv_heads = rows.shape[0], k_pool.shape[1]
    assert all(x.stride(2) == 1 for x in (q, k, v, k_pool, v_pool))
    assert req_to_token.stride(1) == 1
    assert heads % kv_heads == 0
    if out is None:
        out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    assert out.stride(2) == 1
    if sequences == 0 or tokens == 0:
        return out
    min_cached = 0
    is_plain = alibi_slopes is None and window == 0 and soft_cap == 0
    if whole_prompts is not None and is_plain and hopper is not None and hopper.is_made_for(q, k, v):
        hopper.prefill_attention_hopper(q, k, v, whole_prompts.tiles, scale, out)
        if whole_prompts.are_all:
            return out
        min_cached = 1
    pairs, is_quantized = scale_pairs(k_pool, scales)
    blocks = choose_prefill_blocks(head_dim, q.element_size(), compute_capability(q.device), tokens / sequences)
    k_tiles, v_tiles = tiles(k, blocks.tokens), tiles(v, blocks.tokens)
    has_tiles = k_tiles is not None and v_tiles is not None
    # See find_tile.
    grid = (heads, tokens // blocks.queries + sequences)
    prefill_attention_kernel[grid](
        q,
        k,
        v,
        k_tiles if has_tiles else k,
        v_tiles if has_tiles else v,
        k_pool,
        v_pool,
        out,
        req_to_token,
        rows,
        query_starts,
        context_lengths,
        q if alibi_slopes is None else alibi_slopes,
        pairs,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_pool.stride(0),
        k_pool.stride(1),
        v_pool.stride(0),
        v_pool.stride(1),
        out.stride(0),
        out.stride(1),
        req_to_token.stride(0),
        pairs.stride(0),
        sequences,
        min_cached,
        scale * LOG2_E.value,
        window,
        has_alibi=alibi_slopes is not None,
        has_window=window > 0,
        soft_cap=soft_cap,
        is_quantized=is_quantized,
        has_tiles=has_tiles,
        group=heads // kv_heads,
        head_dim=head_dim,
        block_queries=blocks.queries,
        block_tokens=blocks.tokens,
        block_dim=max(16, next_power_of_2(head_dim)),
        stages=blocks.num_stages,
        num_warps=blocks.num_warps,
        maxnreg=blocks.max_registers,
        **dependent_launch(q.device),
    )
    return out
