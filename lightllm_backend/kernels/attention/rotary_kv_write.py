# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Norm and rotary position embedding of prompts' queries and keys, and the writing of K and V to the pool, as int8 if
asked.

token_attention does both for tokens that decode.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.attention.head_norm import HeadNorm
from lightllm_backend.kernels.attention.kv_scales import MAX_KV_SCALE, MIN_KV_SCALE
from lightllm_backend.kernels.attention.step_memo import StepMemo
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.sizes import cdiv, next_power_of_2

# The elements of a program's tile, which is some heads of one token.
_TILE = 2048


@triton.jit
def _load(source, offset, head_live, column, width: tl.constexpr):
    """Loads the first `width` columns of some heads as float32; `offset` [heads] is where each head starts."""
    live = head_live[:, None] & (column < width)[None, :]
    return tl.load(source + offset[:, None] + column[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def _store(target, offset, value, head_live, column, width: tl.constexpr):
    live = head_live[:, None] & (column < width)[None, :]
    tl.store(target + offset[:, None] + column[None, :], value.to(target.dtype.element_ty), mask=live)


@triton.jit
def _norm_factor(squares, eps, head_dim: tl.constexpr):
    """By what heads are multiplied that have these sums of squares."""
    return tl.rsqrt(squares / head_dim + eps)


@triton.jit
def _normed(value, factor, weight, dtype: tl.constexpr):
    """Columns of heads, normed by a factor and their weight: float32, rounded to `dtype`, and to the weight's dtype
    before the product with it, as the models were trained."""
    return ((value * factor).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def _rotate(
    source,
    offset,
    head_live,
    cos,
    sin,
    pair,
    column,
    norm,
    eps,
    has_norm: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
):
    """Norms and rotates some heads; returns both halves of their rotary dimensions, and the others if there are any."""
    first = _load(source, offset, head_live, pair, half)
    second = _load(source + half, offset, head_live, pair, half)
    passed = first
    if 2 * half < head_dim:
        passed = _load(source + 2 * half, offset, head_live, column, head_dim - 2 * half)
    if has_norm:
        dtype: tl.constexpr = source.dtype.element_ty
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if 2 * half < head_dim:
            squares += tl.sum(passed * passed, 1)
        factor = _norm_factor(squares, eps, head_dim)[:, None]
        weight = tl.load(norm + pair, mask=pair < half, other=0.0)
        first = _normed(first, factor, weight[None, :], dtype)
        weight = tl.load(norm + half + pair, mask=pair < half, other=0.0)
        second = _normed(second, factor, weight[None, :], dtype)
        if 2 * half < head_dim:
            weight = tl.load(norm + 2 * half + column, mask=column < head_dim - 2 * half, other=0.0)
            passed = _normed(passed, factor, weight[None, :], dtype)
    return first * cos[None, :] - second * sin[None, :], second * cos[None, :] + first * sin[None, :], passed


@triton.jit
def scale_of(largest, min_scale: tl.constexpr, max_scale: tl.constexpr, dtype: tl.constexpr):
    """The scales for heads of these largest magnitudes: float32, rounded to `dtype`."""
    scale = tl.minimum(tl.maximum(largest * (1 / 127), min_scale), max_scale)
    return tl.where(largest == 0, 1.0, scale).to(dtype).to(tl.float32)


@triton.jit
def quantize(value, scale):
    """Rounds half to even: near 1.5 * 2**23 a float32 has no fraction bits. The limits stand between the product and
    the sum, so that a GPU cannot fuse them and the product is rounded first."""
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)  # one division for all: a dozen instructions
    quotient = tl.minimum(tl.maximum(value * inverse, -127.0), 127.0)
    return (quotient + 12582912.0) - 12582912.0


@triton.jit
def load_norm(norm, head_dim: tl.constexpr, half: tl.constexpr, heads: tl.constexpr, block_dim: tl.constexpr):
    """The weights at `norm` of a head's columns, and of those that they are paired with, for `rotated`.

    They have the shape of the heads, and hence their layout in registers: [heads, block_dim], or [block_dim] of one.
    """
    column = tl.arange(0, block_dim)
    if heads > 1:
        norm += tl.zeros([heads, 1], dtype=tl.int32)
        column = column[None, :]
    weight = tl.load(norm + column, mask=column < head_dim, other=0.0)
    partner = tl.where(column < half, column + half, column - half)
    return weight, tl.load(norm + partner, mask=column < 2 * half, other=0.0)


@triton.jit
def rotated(
    row,
    column,
    live,
    cos,
    sin,
    weight,
    partner_weight,
    eps,
    has_norm: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
):
    """Columns of a head at `row`, or of several at [n, 1], normed if they have a norm, whose weight load_norm returns,
    and rotated by the angles at `cos` and `sin`: float32.

    Column i is paired with i + half; columns from 2 * half on pass through.
    """
    value = tl.load(row + column, mask=live, other=0.0).to(tl.float32)
    if has_norm:
        dtype: tl.constexpr = row.dtype.element_ty
        factor = _norm_factor(tl.sum(value * value, len(value.shape) - 1, keep_dims=True), eps, head_dim)
        value = _normed(value, factor, weight, dtype)
    if half == 0:
        return value
    turns = column < 2 * half
    is_first = column < half
    partner = tl.where(is_first, column + half, column - half)
    other = tl.load(row + partner, mask=live & turns, other=0.0).to(tl.float32)
    if has_norm:
        other = _normed(other, factor, partner_weight, dtype)
    angle = tl.where(is_first, column, column - half)
    cosine = tl.load(cos + angle, mask=turns, other=1.0)
    sine = tl.load(sin + angle, mask=turns, other=0.0)
    return value * cosine + tl.where(is_first, -sine, sine) * other


@triton.jit(do_not_specialize_on_alignment=["slots"])
def rotary_kv_write_kernel(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    k_pool,
    v_pool,
    scales,
    query_starts,
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
    k_slot_stride,
    k_pool_head_stride,
    v_slot_stride,
    v_pool_head_stride,
    scale_stride,
    heads,
    kv_heads,
    eps,
    min_scale: tl.constexpr,
    max_scale: tl.constexpr,
    is_quantized: tl.constexpr,
    has_starts: tl.constexpr,
    has_norm: tl.constexpr,
    is_dependent: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    block_heads: tl.constexpr,
    block_pairs: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Handles some heads of one token: the first programs of a token rotate queries, the others write K and V."""
    passes: tl.constexpr = 2 * half < head_dim  # some columns are not rotated
    token = tl.program_id(0).to(tl.int64)
    query_blocks = tl.cdiv(heads, block_heads)
    block = tl.program_id(1)
    pair = tl.arange(0, block_pairs)
    column = tl.arange(0, block_dim)
    wait_for_previous(is_dependent)
    if has_starts:  # noqa: SIM102 - known when it is compiled
        if token < tl.load(query_starts):
            return  # it decodes
    cosine = tl.load(cos + token * cos_stride + pair, mask=pair < half, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * sin_stride + pair, mask=pair < half, other=0.0).to(tl.float32)
    if block < query_blocks:
        head = block * block_heads + tl.arange(0, block_heads)
        offset = token * q_stride + head * q_head_stride
        live = head < heads
        first, second, passed = _rotate(
            q, offset, live, cosine, sine, pair, column, q_norm, eps, has_norm, head_dim if has_norm else 2 * half, half
        )  # fmt: skip
        _store(q, offset, first, live, pair, half)
        _store(q + half, offset, second, live, pair, half)
        if passes and has_norm:
            _store(q + 2 * half, offset, passed, live, column, head_dim - 2 * half)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            head = (block - query_blocks) * block_heads + tl.arange(0, block_heads)
            live = head < kv_heads
            k_offset = token * k_stride + head * k_head_stride
            k_target = slot * k_slot_stride + head * k_pool_head_stride
            first, second, passed = _rotate(
                k, k_offset, live, cosine, sine, pair, column, k_norm, eps, has_norm, head_dim, half
            )
            value = _load(v, token * v_stride + head * v_head_stride, live, column, head_dim)
            if is_quantized:
                largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
                if passes:
                    largest = tl.maximum(largest, tl.max(tl.abs(passed), 1))
                k_scale = scale_of(largest, min_scale, max_scale, scales.dtype.element_ty)
                tl.store(scales + slot * scale_stride + 2 * head, k_scale, mask=live)
                first, second = quantize(first, k_scale[:, None]), quantize(second, k_scale[:, None])
                if passes:
                    passed = quantize(passed, k_scale[:, None])
                largest = tl.max(tl.abs(value), 1)
                v_scale = scale_of(largest, min_scale, max_scale, scales.dtype.element_ty)
                tl.store(scales + slot * scale_stride + 2 * head + 1, v_scale, mask=live)
                value = quantize(value, v_scale[:, None])
            _store(k_pool, k_target, first, live, pair, half)
            _store(k_pool + half, k_target, second, live, pair, half)
            if passes:
                _store(k_pool + 2 * half, k_target, passed, live, column, head_dim - 2 * half)
            _store(v_pool, slot * v_slot_stride + head * v_pool_head_stride, value, live, column, head_dim)
            # Prefill attention reads new tokens here and not in the pool, and must see the same.
            if is_quantized:
                first, second, passed = first * k_scale[:, None], second * k_scale[:, None], passed * k_scale[:, None]
                value *= v_scale[:, None]
                _store(v, token * v_stride + head * v_head_stride, value, live, column, head_dim)
            _store(k, k_offset, first, live, pair, half)
            _store(k + half, k_offset, second, live, pair, half)
            if passes and (is_quantized or has_norm):
                _store(k + 2 * half, k_offset, passed, live, column, head_dim - 2 * half)


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    scales: Tensor | None = None,
    query_starts: Tensor | None = None,
    memo: StepMemo | None = None,  # noqa: ARG001 - of the reference
    norm: HeadNorm | None = None,
) -> None:
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    assert all(x.stride(2) == 1 for x in (q, k, v, k_pool, v_pool))
    half = cos.shape[1]
    assert cos.stride(1) == sin.stride(1) == 1
    assert 2 * half <= head_dim
    assert (scales is not None) == (k_pool.dtype == torch.int8)
    if tokens == 0:
        return
    block_dim = next_power_of_2(head_dim)
    block_heads = min(next_power_of_2(heads), max(1, _TILE // block_dim))
    grid = (tokens, cdiv(heads, block_heads) + cdiv(kv_heads, block_heads))
    rotary_kv_write_kernel[grid](
        q,
        k,
        v,
        cos,
        sin,
        slots,
        k_pool,
        v_pool,
        k_pool if scales is None else scales,
        slots if query_starts is None else query_starts,
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
        0 if scales is None else scales.stride(0),
        heads,
        kv_heads,
        0.0 if norm is None else norm.eps,
        min_scale=MIN_KV_SCALE,
        max_scale=MAX_KV_SCALE,
        is_quantized=scales is not None,
        has_starts=query_starts is not None,
        has_norm=norm is not None,
        head_dim=head_dim,
        half=half,
        block_heads=block_heads,
        block_pairs=next_power_of_2(max(1, half)),
        block_dim=block_dim,
        num_warps=4,
        **dependent_launch(q.device),
    )
