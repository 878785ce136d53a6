# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Decode attention over an int8 pool with a scale per token and head; the structure is token_attention's.

Keys enter the tensor cores as int8. A query is two int8 per dimension, in columns that would be idle otherwise. Values
are summed as float16: two adjacent ones are loaded as one 16-bit number, which splits into a tile of even dimensions
and one of odd dimensions in registers. A byte becomes a float16 without a conversion: placed under the high byte of
1024, it is the low bits of the fraction. Each value is then too large by the same constant, subtracted at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.attention.head_norm import HeadNorm
from lightllm_backend.kernels.attention.kv_scales import MAX_KV_SCALE, MIN_KV_SCALE, scale_pairs
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
from lightllm_backend.kernels.attention.rotary_kv_write import load_norm, quantize, rotated, scale_of
from lightllm_backend.kernels.attention.step_memo import StepMemo
from lightllm_backend.kernels.dependent_launch import can_start_next, dependent_launch, start_next, wait_for_previous
from lightllm_backend.kernels.hardware import MIN_COLUMNS, compute_capability, has_ptx, multiprocessor_count
from lightllm_backend.kernels.sizes import next_power_of_2


@triton.jit
def _unpack(pair, dtype: tl.constexpr, offset: tl.constexpr, is_ptx: tl.constexpr):
    """The low and the high byte of 16-bit numbers as `dtype`, all of them too large by `offset`."""
    if is_ptx:
        tl.static_assert(offset == 1152)  # 1024, and 128 to make the byte unsigned
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes;
            xor.b32 bytes, $2, 0x80808080;
            prmt.b32 $0, bytes, 0x64646464, 0x4240;
            prmt.b32 $1, bytes, 0x64646464, 0x4341;
            }""",
            "=r,=r,r",
            [pair],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return (((pair << 8) >> 8) + offset).to(dtype), ((pair >> 8) + offset).to(dtype)


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


@triton.jit
def _log2(value, is_ptx: tl.constexpr):
    """log2 of normal numbers; Triton-lang's own handles denormals, in two dozen instructions."""
    if is_ptx:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, is_pure=True, pack=1
        )
    return tl.log2(value)


@triton.jit
def _round(value):
    """Rounds half to even: near 1.5 * 2**23 a float32 has no fraction bits."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _split_query(query, rows: tl.constexpr, dtype: tl.constexpr):
    """Queries [n, dim] as pairs of rows [2 n, dim], and the units [n] they are multiples of; one query is broadcast.

    As int8, row 2 i holds multiples of 128 and row 2 i + 1 the rest: 15 bits together, more than bfloat16 has.
    """
    if dtype == tl.int8:
        largest = tl.max(tl.abs(query), 1)
        unit = tl.where(largest == 0, 1.0, largest * (1 / 16256))
        whole = _round(query * (1.0 / unit)[:, None])
        high = _round(whole * (1 / 128))
        low = whole - 128 * high
    else:
        unit = tl.full([query.shape[0]], 1.0, tl.float32)
        high, low = query, tl.zeros_like(query)
    # Not tl.join, whose result gets a layout for narrower numbers, which dots read slowly.
    parts = tl.where(tl.arange(0, 2)[None, :, None] == 0, high[:, None, :], low[:, None, :]).to(dtype)
    parts = tl.broadcast_to(parts, (rows, 2, query.shape[1])).reshape(2 * rows, query.shape[1])
    return parts, tl.broadcast_to(unit, (rows,))


@triton.jit
def _scores(key, query, dtype: tl.constexpr):
    """The products [tokens, n] of keys [tokens, dim] with the rows that `_split_query` returns."""
    tokens: tl.constexpr = key.shape[0]
    columns: tl.constexpr = query.shape[1]
    if dtype == tl.int8:
        product = tl.dot(key, query, out_dtype=tl.int32)
    else:
        product = tl.dot(key.to(dtype), query, input_precision="ieee")
    high, low = tl.split(product.reshape(tokens, columns // 2, 2))
    return (128 * high + low).to(tl.float32) if dtype == tl.int8 else high + low


@triton.jit(do_not_specialize=["splits"])
def token_attention_int8_kernel(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    k_pool,
    v_pairs,
    scales,
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
    scale_stride: tl.constexpr,
    out_stride,
    out_head_stride,
    table_stride,
    scale_log2,
    window,
    eps,
    heads,
    splits,
    key_dtype: tl.constexpr,
    dtype: tl.constexpr,
    is_ptx: tl.constexpr,
    is_split: tl.constexpr,
    has_alibi: tl.constexpr,
    has_norm: tl.constexpr,
    soft_cap: tl.constexpr,
    is_dependent: tl.constexpr,
    starts_next: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    min_scale: tl.constexpr,
    max_scale: tl.constexpr,
    block_group: tl.constexpr,
    block_tokens: tl.constexpr,
    block_dim: tl.constexpr,
    stages: tl.constexpr,
):
    """Attends over one split of a context, for one KV head and the `group` query heads that share it."""
    offset: tl.constexpr = 1152 if dtype == tl.float16 else 0
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
    start_next(starts_next)
    wait_for_previous(is_dependent)
    # Issue all loads that a part begins with before using any of them.
    column = tl.arange(0, block_dim)
    column_live = column < head_dim
    pair = tl.arange(0, block_dim // 2)
    pair_live = pair < head_dim // 2
    member = tl.arange(0, block_group)
    head = kv_head * group + member
    live = (member < group)[:, None] & column_live[None, :]
    cos += sequence * cos_stride
    sin += sequence * sin_stride
    q_row = q + sequence * q_stride + kv_head * group * q_head_stride
    if group == 1:
        query = rotated(
            q_row, column, column_live, cos, sin, q_weight, q_partner_weight, eps, has_norm, head_dim, half
        )[None, :]
    else:
        q_row += member[:, None] * q_head_stride
        query = rotated(
            q_row, column[None, :], live, cos, sin, q_weight, q_partner_weight, eps, has_norm, head_dim, half
        )
    k_row = k + sequence * k_stride + kv_head * k_head_stride
    new_key = rotated(k_row, column, column_live, cos, sin, k_weight, k_partner_weight, eps, has_norm, head_dim, half)
    v_row = v + sequence * v_stride + kv_head * v_head_stride
    v_even = tl.load(v_row + 2 * pair, mask=pair_live, other=0.0).to(tl.float32)
    v_odd = tl.load(v_row + 2 * pair + 1, mask=pair_live, other=0.0).to(tl.float32)
    if has_alibi:
        slope_log2 = tl.load(alibi_slopes + head, mask=member < group, other=0.0) * LOG2_E

    query *= scale_log2
    parts, unit = _split_query(query, block_group, key_dtype)
    k_scale = scale_of(tl.max(tl.abs(new_key)), min_scale, max_scale, tl.float16)
    v_scale = scale_of(tl.max(tl.maximum(tl.abs(v_even), tl.abs(v_odd))), min_scale, max_scale, tl.float16)
    new_key, v_even, v_odd = quantize(new_key, k_scale), quantize(v_even, v_scale), quantize(v_odd, v_scale)
    start, end = split_range(context, window, split, splits, block_tokens)
    k_head = k_pool + kv_head * k_pool_head_stride + column
    v_head = v_pairs + kv_head * (v_pool_head_stride // 2) + pair
    has_new = (start < end) & (end == context)
    is_written = has_new & (new_slot >= 0)
    written = tl.where(is_written, head_dim, 0)
    tl.store(k_head + new_slot * k_slot_stride, new_key.to(tl.int8), mask=column < written)
    tl.store(v_head + new_slot * (v_slot_stride // 2), _pack(v_even, v_odd), mask=2 * pair < written)
    k_bits = k_scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    v_bits = v_scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(scales + new_slot * scale_stride + kv_head, (v_bits << 16) | (k_bits & 0xFFFF), mask=is_written)
    new_score = soft_capped(tl.sum(query * new_key[None, :], 1) * k_scale, soft_cap) + _log2(v_scale, is_ptx)
    maximum = tl.where(has_new, tl.broadcast_to(new_score, (block_group,)), float("-inf"))
    # The sum of weights, kept per token of a block until the end.
    is_first = tl.arange(0, block_tokens)[:, None] == 0
    total = tl.zeros([block_tokens, block_group], dtype=tl.float32)
    total += tl.where(is_first, tl.where(has_new, 1.0 / v_scale, 0.0), 0.0)
    surplus = tl.zeros([block_tokens, block_group], dtype=tl.float32)
    even_accumulator = tl.zeros([block_dim // 2, 2 * block_group], dtype=tl.float32)
    even_accumulator += tl.where(has_new, v_even, 0.0)[:, None]
    odd_accumulator = tl.zeros([block_dim // 2, 2 * block_group], dtype=tl.float32)
    odd_accumulator += tl.where(has_new, v_odd, 0.0)[:, None]
    v_bytes = (v_pairs + kv_head * (v_pool_head_stride // 2)).to(tl.pointer_type(tl.int8))
    scale_bytes = (scales + kv_head).to(tl.pointer_type(tl.int8))
    end -= has_new.to(tl.int32)
    for first in tl.range(start, end, block_tokens, num_stages=stages):
        token = first + tl.arange(0, block_tokens)
        token_live = token < end
        # Saves instructions as in token_attention.
        slot = tl.load(slot_row + tl.minimum(token, end - 1)).to(tl.uint32).to(tl.uint64)
        key_rows = k_head[None, :] + (slot * k_slot_stride)[:, None]
        value_columns = (v_bytes + (slot * v_slot_stride)[None, :]).to(tl.pointer_type(tl.int16)) + pair[:, None]
        scale_pair = tl.load((scale_bytes + slot * (4 * scale_stride)).to(tl.pointer_type(tl.int32)))
        if head_dim == block_dim:
            key, value = tl.load(key_rows), tl.load(value_columns)
        else:
            key = tl.load(key_rows, mask=column_live[None, :], other=0)
            value = tl.load(value_columns, mask=pair_live[:, None], other=0)
        k_scales, v_scales = unpack_scales(scale_pair)
        # V's scale is part of the weights, whose maximum is thus 1, so float16 can hold them.
        log_scales = _log2(v_scales, is_ptx)
        score = _scores(key, tl.trans(parts), key_dtype) * unit[None, :] * k_scales[:, None]
        score = soft_capped(score, soft_cap) + log_scales[:, None]
        if has_alibi:
            score += slope_log2[None, :] * (token - (context - 1)).to(tl.float32)[:, None]
        score = tl.where(token_live[:, None], score, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(score, 0))
        weight = tl.exp2(score - new_maximum[None, :])
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction[None, :] + weight * tl.exp2(-log_scales)[:, None]
        weight = weight.to(dtype)
        surplus = surplus * correction[None, :] + weight.to(tl.float32)
        weights = tl.broadcast_to(weight[:, :, None], (block_tokens, block_group, 2))
        weights = weights.reshape(block_tokens, 2 * block_group)
        corrections = tl.broadcast_to(correction[None, :, None], (1, block_group, 2)).reshape(1, 2 * block_group)
        v_evens, v_odds = _unpack(value, dtype, offset, is_ptx)
        even_accumulator = tl.dot(v_evens, weights, even_accumulator * corrections, input_precision="ieee")
        odd_accumulator = tl.dot(v_odds, weights, odd_accumulator * corrections, input_precision="ieee")
        maximum = new_maximum

    # The results of an empty part are not read. A padding row of `out` is not written.
    total = tl.sum(total, 0)
    divisor = tl.where(total > 0, total, 1.0)
    factor = 1.0 / divisor
    surplus = offset * tl.sum(surplus, 0)
    even, _ = tl.split(even_accumulator.reshape(block_dim // 2, block_group, 2))
    odd, _ = tl.split(odd_accumulator.reshape(block_dim // 2, block_group, 2))
    result = (tl.join(even, odd) - surplus[None, :, None]) * factor[None, :, None]
    result = tl.permute(result, (1, 0, 2)).reshape(block_group, block_dim)
    if is_split:
        index = (sequence * heads + head) * splits + split
        tl.store(partial + index[:, None] * head_dim + column[None, :], result, mask=live)
        tl.store(log_sums + index, maximum + tl.log2(divisor), mask=member < group)
    else:
        address = out + sequence * out_stride + head[:, None] * out_head_stride + column[None, :]
        written = (member < tl.where(context > 0, group, 0))[:, None] & column_live[None, :]
        tl.store(address, result.to(out.dtype.element_ty), mask=written)


def choose_int8_decode_blocks(
    block_dim: int, element_size: int, capability: tuple[int, int], heads: int
) -> TokenBlocks:
    """The tile for `heads` KV heads of all sequences together, measured as token_attention's."""
    if element_size == 4:
        return TokenBlocks(16, 4, 1)
    tokens = min(128, max(16, 4096 // block_dim))
    if capability < (8, 0):
        return TokenBlocks(tokens, 1, 1)
    return TokenBlocks(min(128, 2 * tokens), 2, 2) if 320 <= heads < 1152 else TokenBlocks(tokens, 1, 2)


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
    memo: StepMemo | None = None,  # noqa: ARG001 - of the reference
    norm: HeadNorm | None = None,
    soft_cap: float = 0.0,
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
        out = torch.zeros((sequences, heads, head_dim), dtype=q.dtype, device=q.device)
    if sequences == 0:
        return out
    pairs, _ = scale_pairs(k_pool, scales)
    group = heads // kv_heads
    longest = min(max_context_length, window) if window else max_context_length
    block_dim = max(32, next_power_of_2(head_dim))
    is_half = q.element_size() == 2
    dtype = tl.float16 if is_half else tl.float32
    capability = compute_capability(q.device)
    blocks = choose_int8_decode_blocks(block_dim, q.element_size(), capability, sequences * kv_heads)
    splits = split_count(sequences * kv_heads, longest, multiprocessor_count(q.device), blocks.num_warps)
    partial, log_sums = split_buffers(out, splits)
    token_attention_int8_kernel[(kv_heads, sequences, splits)](
        q,
        k,
        v,
        cos,
        sin,
        slots,
        k_pool,
        v_pool.view(torch.int16),
        pairs,
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
        pairs.stride(0),
        out.stride(0),
        out.stride(1),
        req_to_token.stride(0),
        scale * LOG2_E.value,
        window or NO_WINDOW,
        0.0 if norm is None else norm.eps,
        heads,
        splits,
        key_dtype=tl.int8 if is_half and capability >= (8, 0) else dtype,
        dtype=dtype,
        is_ptx=is_half and has_ptx(q.device),
        is_split=splits > 1,
        has_alibi=alibi_slopes is not None,
        has_norm=norm is not None,
        soft_cap=soft_cap,
        group=group,
        head_dim=head_dim,
        half=cos.shape[1],
        min_scale=MIN_KV_SCALE,
        max_scale=MAX_KV_SCALE,
        block_group=max(MIN_COLUMNS // 2, next_power_of_2(group)),
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
