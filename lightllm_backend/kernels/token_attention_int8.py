# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention over a pool of int8 with a scale for each token and head; see token_attention.

Tensor cores are fed with 16-bit numbers, so two int8 side by side are read as one of those, and only in registers
become two tiles: the even dimensions and the odd ones. A byte turns into a float16 without a conversion: behind the
high byte of 1024 it is the lowest bits of the fraction.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import compute_capability, has_ptx, multiprocessor_count
from lightllm_backend.kernels.kv_scales import MAX_KV_SCALE, MIN_KV_SCALE, scale_pairs
from lightllm_backend.kernels.merge_splits import (
    LOG2_E,
    NO_WINDOW,
    TokenBlocks,
    merge_splits,
    split_buffers,
    split_count,
    split_range,
)
from lightllm_backend.kernels.rotary_kv_write import quantize, rotated, scale_of


@triton.jit
def _unpack(pair, dtype: tl.constexpr, is_ptx: tl.constexpr):
    """The low and the high byte of 16-bit numbers, as numbers of `dtype`."""
    if is_ptx:
        # 128 is added to make the byte unsigned; 1152 is 1024 and this.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, low, high;
            xor.b32 bytes, $2, 0x80808080;
            prmt.b32 low, bytes, 0x64646464, 0x4240;
            prmt.b32 high, bytes, 0x64646464, 0x4341;
            mov.b32 bytes, 0x64806480;
            sub.f16x2 $0, low, bytes;
            sub.f16x2 $1, high, bytes;
            }""",
            "=r,=r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return ((pair << 8) >> 8).to(dtype), (pair >> 8).to(dtype)


@triton.jit
def _pack(low, high):
    """Two numbers from -127 to 127 as the bytes of a 16-bit number."""
    return ((high.to(tl.int32) << 8) | (low.to(tl.int32) & 255)).to(tl.int16)


@triton.jit
def unpack_scales(pair):
    """The scales of K and of V."""
    k_scale = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    v_scale = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return k_scale.to(tl.float32), v_scale.to(tl.float32)


@triton.jit(do_not_specialize=["splits"])
def token_attention_int8_kernel(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    k_pool,
    v_pool,
    scales,
    out,
    partial,
    log_sums,
    req_to_token,
    rows,
    context_lengths,
    alibi_slopes,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    cos_stride,
    sin_stride,
    k_slot_stride,
    k_pool_head_stride,
    v_slot_stride,
    v_pool_head_stride,
    scale_stride,
    out_stride,
    out_head_stride,
    table_stride,
    scale_log2,
    window,
    heads,
    splits,
    dtype: tl.constexpr,
    is_ptx: tl.constexpr,
    is_split: tl.constexpr,
    has_alibi: tl.constexpr,
    is_dependent: tl.constexpr,
    group: tl.constexpr,
    head_pairs: tl.constexpr,
    half: tl.constexpr,
    min_scale: tl.constexpr,
    max_scale: tl.constexpr,
    block_group: tl.constexpr,
    block_tokens: tl.constexpr,
    block_pairs: tl.constexpr,
    stages: tl.constexpr,
):
    """One split of a sequence's context, one KV head and the `group` query heads that share it. The pools are int16."""
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    wait_for_previous(is_dependent)
    # All that a part begins with is asked for before any of it is needed.
    context = tl.load(context_lengths + sequence)
    slot_row = req_to_token + tl.load(rows + sequence).to(tl.int64) * table_stride
    new_slot = tl.load(slots + sequence).to(tl.int64)
    pair = tl.arange(0, block_pairs)
    pair_live = pair < head_pairs
    even_column, odd_column = 2 * pair, 2 * pair + 1
    member = tl.arange(0, block_group)
    head = kv_head * group + member
    live = (member < group)[:, None] & pair_live[None, :]
    cos += sequence * cos_stride
    sin += sequence * sin_stride
    q_row = q + sequence * q_stride + kv_head * group * q_head_stride
    if group == 1:
        even = tl.where(live, rotated(q_row, even_column, pair_live, cos, sin, half)[None, :], 0.0)
        odd = tl.where(live, rotated(q_row, odd_column, pair_live, cos, sin, half)[None, :], 0.0)
    else:
        q_row += member[:, None] * q_head_stride
        even = rotated(q_row, even_column[None, :], live, cos, sin, half)
        odd = rotated(q_row, odd_column[None, :], live, cos, sin, half)
    # Scaled first, which keeps them in float16's range.
    even, odd = (even * scale_log2).to(dtype), (odd * scale_log2).to(dtype)
    k_row = k + sequence * k_stride + kv_head * k_head_stride
    k_even = rotated(k_row, even_column, pair_live, cos, sin, half)
    k_odd = rotated(k_row, odd_column, pair_live, cos, sin, half)
    v_row = v + sequence * v_stride + kv_head * v_head_stride
    v_even = tl.load(v_row + even_column, mask=pair_live, other=0.0).to(tl.float32)
    v_odd = tl.load(v_row + odd_column, mask=pair_live, other=0.0).to(tl.float32)
    if has_alibi:
        slope_log2 = tl.load(alibi_slopes + head, mask=member < group, other=0.0) * LOG2_E

    k_scale = scale_of(tl.max(tl.maximum(tl.abs(k_even), tl.abs(k_odd))), min_scale, max_scale, tl.float16)
    v_scale = scale_of(tl.max(tl.maximum(tl.abs(v_even), tl.abs(v_odd))), min_scale, max_scale, tl.float16)
    k_even, k_odd = quantize(k_even, k_scale), quantize(k_odd, k_scale)
    v_even, v_odd = quantize(v_even, v_scale), quantize(v_odd, v_scale)
    start, end = split_range(context, window, split, splits, block_tokens)
    k_head = k_pool + kv_head * k_pool_head_stride + pair
    v_head = v_pool + kv_head * v_pool_head_stride + pair
    has_new = (start < end) & (end == context)
    is_written = has_new & (new_slot >= 0)
    written = pair < tl.where(is_written, head_pairs, 0)
    tl.store(k_head + new_slot * k_slot_stride, _pack(k_even, k_odd), mask=written)
    tl.store(v_head + new_slot * v_slot_stride, _pack(v_even, v_odd), mask=written)
    k_bits = k_scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    v_bits = v_scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(scales + new_slot * scale_stride + kv_head, (v_bits << 16) | (k_bits & 0xFFFF), mask=is_written)
    new_score = tl.sum(even.to(tl.float32) * k_even[None, :], 1) + tl.sum(odd.to(tl.float32) * k_odd[None, :], 1)
    maximum = tl.where(has_new, new_score * k_scale + tl.log2(v_scale), float("-inf"))
    total = tl.zeros([block_group], dtype=tl.float32) + tl.where(has_new, 1.0 / v_scale, 0.0)
    even_accumulator = tl.zeros([block_group, block_pairs], dtype=tl.float32)
    even_accumulator += tl.where(has_new, v_even, 0.0)[None, :]
    odd_accumulator = tl.zeros([block_group, block_pairs], dtype=tl.float32)
    odd_accumulator += tl.where(has_new, v_odd, 0.0)[None, :]
    end -= has_new.to(tl.int32)
    for first in tl.range(start, end, block_tokens, num_stages=stages):
        token = first + tl.arange(0, block_tokens)
        token_live = token < end
        slot = tl.load(slot_row + token, mask=token_live, other=0).to(tl.int64)
        kv_live = token_live[:, None] & pair_live[None, :]
        k_pairs = tl.load(k_head[None, :] + slot[:, None] * k_slot_stride, mask=kv_live, other=0)
        v_pairs = tl.load(v_head[None, :] + slot[:, None] * v_slot_stride, mask=kv_live, other=0)
        k_evens, k_odds = _unpack(k_pairs, dtype, is_ptx)
        v_evens, v_odds = _unpack(v_pairs, dtype, is_ptx)
        # Both are 1.0 where there is no token.
        scale_pair = tl.load(scales + slot * scale_stride + kv_head, mask=token_live, other=0x3C003C00)
        k_scales, v_scales = unpack_scales(scale_pair)
        score = tl.dot(even, tl.trans(k_evens), input_precision="ieee")
        score = tl.dot(odd, tl.trans(k_odds), score, input_precision="ieee")
        # V's scale is part of the weights, and the greatest is 1 with it: float16 could not hold them otherwise.
        score = score * k_scales[None, :] + tl.log2(v_scales)[None, :]
        if has_alibi:
            score += slope_log2[:, None] * (token - (context - 1)).to(tl.float32)[None, :]
        score = tl.where(token_live[None, :], score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + tl.sum(weight * (1.0 / v_scales)[None, :], 1)
        weight = weight.to(dtype)
        even_accumulator = even_accumulator * correction[:, None]
        even_accumulator = tl.dot(weight, v_evens, even_accumulator, input_precision="ieee")
        odd_accumulator = odd_accumulator * correction[:, None]
        odd_accumulator = tl.dot(weight, v_odds, odd_accumulator, input_precision="ieee")
        maximum = new_maximum

    # Nothing was seen by an empty split, or in a padding row: zeros, with a log sum of -inf.
    divisor = tl.where(total > 0, total, 1.0)
    result = tl.interleave(even_accumulator, odd_accumulator) / divisor[:, None]
    column = tl.arange(0, 2 * block_pairs)
    live = (member < group)[:, None] & (column < 2 * head_pairs)[None, :]
    if is_split:
        index = (sequence * heads + head) * splits + split
        tl.store(partial + index[:, None] * (2 * head_pairs) + column[None, :], result, mask=live)
        tl.store(log_sums + index, maximum + tl.log2(divisor), mask=member < group)
    else:
        address = out + sequence * out_stride + head[:, None] * out_head_stride + column[None, :]
        tl.store(address, result.to(out.dtype.element_ty), mask=live)


def choose_blocks(block_pairs: int, element_size: int, capability: tuple[int, int]) -> TokenBlocks:
    """As for the other pools, in tiles of as many tokens."""
    if element_size == 4:
        return TokenBlocks(16, 4, 1)
    tokens = min(128, max(16, 2048 // block_pairs))
    return TokenBlocks(tokens, 1, 2 if capability >= (8, 0) else 1)


def token_attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    scales: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    context_lengths: Tensor,
    max_context_length: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    sequences, heads, head_dim = q.shape
    kv_heads = k_pool.shape[1]
    assert k_pool.dtype == v_pool.dtype == torch.int8
    assert all(x.stride(2) == 1 for x in (q, k, v, k_pool, v_pool))
    assert cos.stride(1) == sin.stride(1) == req_to_token.stride(1) == 1
    assert 2 * cos.shape[1] <= head_dim
    assert heads % kv_heads == 0
    assert head_dim % 2 == 0
    assert max_context_length <= req_to_token.shape[1]
    if out is None:
        out = torch.empty((sequences, heads, head_dim), dtype=q.dtype, device=q.device)
    if sequences == 0:
        return out
    pairs, _ = scale_pairs(k_pool, scales)
    k_pool, v_pool = k_pool.view(torch.int16), v_pool.view(torch.int16)
    group = heads // kv_heads
    longest = min(max_context_length, window) if window else max_context_length
    splits = split_count(sequences * kv_heads, longest, multiprocessor_count(q.device))
    partial, log_sums = split_buffers(out, splits)
    block_pairs = max(16, triton.next_power_of_2(head_dim // 2))
    is_half = q.element_size() == 2
    blocks = choose_blocks(block_pairs, q.element_size(), compute_capability(q.device))
    token_attention_int8_kernel[(kv_heads, sequences, splits)](
        q,
        k,
        v,
        cos,
        sin,
        slots,
        k_pool,
        v_pool,
        pairs,
        out,
        partial,
        log_sums,
        req_to_token,
        rows,
        context_lengths,
        q if alibi_slopes is None else alibi_slopes,
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
        pairs.stride(0),
        out.stride(0),
        out.stride(1),
        req_to_token.stride(0),
        scale * LOG2_E.value,
        window or NO_WINDOW,
        heads,
        splits,
        dtype=tl.float16 if is_half else tl.float32,
        is_ptx=is_half and has_ptx(q.device),
        is_split=splits > 1,
        has_alibi=alibi_slopes is not None,
        group=group,
        head_pairs=head_dim // 2,
        half=cos.shape[1],
        min_scale=MIN_KV_SCALE,
        max_scale=MAX_KV_SCALE,
        block_group=max(16, triton.next_power_of_2(group)),
        block_tokens=blocks.tokens,
        block_pairs=block_pairs,
        stages=blocks.num_stages,
        num_warps=blocks.num_warps,
        **dependent_launch(q.device),
    )
    return merge_splits(partial, log_sums, out) if splits > 1 else out
