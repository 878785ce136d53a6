# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The loops of prefill_attention's kernel: over the cached tokens of a sequence, and over its new ones."""

import triton
import triton.language as tl

from lightllm_backend.kernels.attention.merge_splits import soft_capped
from lightllm_backend.kernels.attention.token_attention_int8 import unpack_scales


@triton.jit
def find_tile(tile, query_starts, sequences, block_queries: tl.constexpr):
    """The sequence of a tile of the grid, the tile's number within it, and the sequence's first token.

    The tiles of sequence s start at (query_starts[s] - query_starts[0]) // block_queries + s, which leaves it as many
    as it needs, or one more.
    """
    origin = tl.load(query_starts)
    # Independent loads and a single sum. With 8 warps, a sum of more than `block` numbers makes ptxas 12.8 serialize
    # all matrix products of the kernel.
    block: tl.constexpr = 128
    rounds: tl.constexpr = 4
    begins = tl.zeros([block], dtype=tl.int32)
    for first in range(0, sequences, rounds * block):
        for turn in tl.static_range(rounds):
            index = first + turn * block + tl.arange(0, block)
            start = tl.load(query_starts + index, mask=index < sequences, other=0) - origin
            begins += ((index < sequences) & (start // block_queries + index <= tile)).to(tl.int32)
    sequence = tl.sum(begins, 0) - 1
    query_start = tl.load(query_starts + sequence)
    return sequence, tile - ((query_start - origin) // block_queries + sequence), query_start


@triton.jit
def _online_softmax(accumulator, maximum, total, score, factor, value, inverse_scale, is_scaled: tl.constexpr):
    """Adds a block of scores and its V to the running softmax.

    Scores times `factor`, which is positive, are exponents of 2: one instruction multiplies and subtracts the maximum.
    """
    new_maximum = tl.maximum(maximum, tl.max(score, 1) * factor)
    weight = tl.exp2(score * factor - new_maximum[:, None])
    correction = tl.exp2(maximum - new_maximum)
    if is_scaled:
        total = total * correction + tl.sum(weight * inverse_scale[None, :], 1)
    else:
        total = total * correction + tl.sum(weight, 1)
    accumulator = accumulator * correction[:, None]
    accumulator = tl.dot(weight.to(value.dtype), value, accumulator, input_precision="ieee")
    return accumulator, new_maximum, total


@triton.jit
def attend_cached(
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
    scale_head,
    scale_stride,
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
    soft_cap: tl.constexpr,
    stages: tl.constexpr,
):
    """Attends over cached tokens `start` to `end`, all of them older than any query."""
    column = tl.arange(0, block_dim)
    for first in tl.range(start, end, block_tokens, num_stages=stages):
        token = first + tl.arange(0, block_tokens)
        live = token < end
        slot = tl.load(slot_row + token, mask=live, other=0).to(tl.int64)
        kv_live = live[:, None] & (column < head_dim)[None, :]
        key = tl.load(k_head + slot[:, None] * k_slot_stride + column[None, :], mask=kv_live, other=0.0)
        value = tl.load(v_head + slot[:, None] * v_slot_stride + column[None, :], mask=kv_live, other=0.0)
        score = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        inverse_scale = maximum
        factor = 1.0
        if is_quantized:
            # Both default to 1.0.
            k_scale, v_scale = unpack_scales(tl.load(scale_head + slot * scale_stride, mask=live, other=0x3C003C00))
            # V's scale is part of the weights, whose maximum is thus 1, so float16 can hold them.
            score = soft_capped(score * (k_scale * scale_log2)[None, :], soft_cap) + tl.log2(v_scale)[None, :]
            inverse_scale = 1.0 / v_scale
        elif has_alibi or soft_cap > 0:
            score = soft_capped(score * scale_log2, soft_cap)
        else:
            factor = scale_log2
        if has_alibi:
            score += (slope_log2 * (token - origin).to(tl.float32))[None, :]
        seen = live[None, :]
        if has_window:
            seen = seen & (token[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        accumulator, maximum, total = _online_softmax(
            accumulator, maximum, total, score, factor, value.to(query.dtype), inverse_scale, is_quantized
        )
    return accumulator, maximum, total


@triton.jit
def attend_new(
    accumulator,
    maximum,
    total,
    query,
    index,
    k_head,
    v_head,
    k_stride,
    v_stride,
    k_tiles,
    v_tiles,
    tile_row,
    tile_column,
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
    is_masked: tl.constexpr,
    is_whole: tl.constexpr,
    has_tiles: tl.constexpr,
    soft_cap: tl.constexpr,
    stages: tl.constexpr,
):
    """Attends over the sequence's new tokens `start` to `end`; every query sees them all unless `is_masked`.

    With tiles, the sequence's first token and this head lie at `tile_row` and `tile_column`. A tile that is not whole
    extends into memory of another sequence or of none, perhaps NaN, which a weight of 0 would not remove.
    """
    column = tl.arange(0, block_dim)
    for first in tl.range(start, end, block_tokens, num_stages=stages):
        token = first + tl.arange(0, block_tokens)
        if has_tiles:
            key = k_tiles.load([tile_row + first, tile_column])
            value = v_tiles.load([tile_row + first, tile_column])
            if not is_whole:
                value = tl.where((token < end)[:, None], value, 0.0)
        else:
            kv_live = (column < head_dim)[None, :]
            if not is_whole:
                kv_live = kv_live & (token < end)[:, None]
            key = tl.load(k_head + token[:, None].to(tl.int64) * k_stride + column[None, :], mask=kv_live, other=0.0)
            value = tl.load(v_head + token[:, None].to(tl.int64) * v_stride + column[None, :], mask=kv_live, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        factor = scale_log2
        if has_alibi or soft_cap > 0:
            score = soft_capped(score * scale_log2, soft_cap)
            factor = 1.0
        if has_alibi:
            score += (slope_log2 * (token - origin).to(tl.float32))[None, :]
        if is_masked:
            seen = (token < end)[None, :] & (token[None, :] <= index[:, None])
            if has_window:
                seen = seen & (token[None, :] > index[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        accumulator, maximum, total = _online_softmax(accumulator, maximum, total, score, factor, value, maximum, False)
    return accumulator, maximum, total
