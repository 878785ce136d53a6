# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Rotary position embedding of queries and keys, with the writing of K and V to the pool."""

import triton
import triton.language as tl
from torch import Tensor

# Elements of a program's tile: some heads of one token.
_TILE = 2048


@triton.jit
def _rotate_heads(source, target, offset, target_offset, head_live, cos, sin, pair, half: tl.constexpr):
    """Rotates the pairs of some heads' rotary dimensions; `offset` and `target_offset` point at each head's start."""
    live = head_live[:, None] & (pair < half)[None, :]
    address = source + offset[:, None] + pair[None, :]
    first = tl.load(address, mask=live, other=0.0).to(tl.float32)
    second = tl.load(address + half, mask=live, other=0.0).to(tl.float32)
    address = target + target_offset[:, None] + pair[None, :]
    element = target.dtype.element_ty
    tl.store(address, (first * cos[None, :] - second * sin[None, :]).to(element), mask=live)
    tl.store(address + half, (second * cos[None, :] + first * sin[None, :]).to(element), mask=live)


@triton.jit
def _copy_heads(source, target, offset, target_offset, head_live, column, head_dim: tl.constexpr):
    live = head_live[:, None] & (column < head_dim)[None, :]
    value = tl.load(source + offset[:, None] + column[None, :], mask=live, other=0.0)
    tl.store(target + target_offset[:, None] + column[None, :], value.to(target.dtype.element_ty), mask=live)


@triton.jit
def rotary_kv_write_kernel(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    k_pool,
    v_pool,
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
    heads,
    kv_heads,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    block_heads: tl.constexpr,
    block_pairs: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One token and some of its heads: the first programs of a token rotate queries, the others write K and V."""
    token = tl.program_id(0).to(tl.int64)
    query_blocks = tl.cdiv(heads, block_heads)
    block = tl.program_id(1)
    pair = tl.arange(0, block_pairs)
    cosine = tl.load(cos + token * cos_stride + pair, mask=pair < half, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * sin_stride + pair, mask=pair < half, other=0.0).to(tl.float32)
    if block < query_blocks:
        head = block * block_heads + tl.arange(0, block_heads)
        offset = token * q_stride + head * q_head_stride
        _rotate_heads(q, q, offset, offset, head < heads, cosine, sine, pair, half)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            head = (block - query_blocks) * block_heads + tl.arange(0, block_heads)
            live = head < kv_heads
            column = tl.arange(0, block_dim)
            k_offset = token * k_stride + head * k_head_stride
            k_target = slot * k_slot_stride + head * k_pool_head_stride
            _rotate_heads(k, k_pool, k_offset, k_target, live, cosine, sine, pair, half)
            if 2 * half < head_dim:
                _copy_heads(k + 2 * half, k_pool + 2 * half, k_offset, k_target, live, column, head_dim - 2 * half)
            v_offset = token * v_stride + head * v_head_stride
            v_target = slot * v_slot_stride + head * v_pool_head_stride
            _copy_heads(v, v_pool, v_offset, v_target, live, column, head_dim)


def rotary_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
) -> None:
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    assert all(x.stride(2) == 1 for x in (q, k, v, k_pool, v_pool))
    half = cos.shape[1]
    assert cos.stride(1) == sin.stride(1) == 1
    assert 2 * half <= head_dim
    if tokens == 0:
        return
    block_dim = triton.next_power_of_2(head_dim)
    block_heads = min(triton.next_power_of_2(heads), max(1, _TILE // block_dim))
    grid = (tokens, triton.cdiv(heads, block_heads) + triton.cdiv(kv_heads, block_heads))
    rotary_kv_write_kernel[grid](
        q,
        k,
        v,
        cos,
        sin,
        slots,
        k_pool,
        v_pool,
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
        heads,
        kv_heads,
        head_dim=head_dim,
        half=half,
        block_heads=block_heads,
        block_pairs=triton.next_power_of_2(max(1, half)),
        block_dim=block_dim,
        num_warps=4,
    )
