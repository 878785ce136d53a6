# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-calls
"""Decode attention in one call: norm of heads, rotary embedding, writing K and V, and attention over the pool."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.kernels import reference
from lightllm_backend.kernels.attention.head_norm import HeadNorm
from lightllm_backend.kernels.attention.step_memo import StepMemo, once
from lightllm_backend.kernels.compiled.numbers import (
    DTYPES,
    array,
    compiled,
    exp,
    lasting_array,
    load,
    normed,
    rounded,
    row,
    vector,
)
from lightllm_backend.kernels.compiled.threads import in_parts

# Tokens of all contexts together that several threads share.
_MANY_CONTEXT_TOKENS = 4096


@compiled
def _rotate(x: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any], factor: Any, out: NDArray[Any]) -> None:
    """One head's dimensions, times a factor, to float32."""
    half = cos.shape[0]
    for i in range(half):
        first, second = load(x[i]), load(x[half + i])
        out[i] = (first * cos[i] - second * sin[i]) * factor
        out[half + i] = (second * cos[i] + first * sin[i]) * factor
    for i in range(2 * half, x.shape[0]):
        out[i] = load(x[i]) * factor


@compiled
def _attend(
    of_q: int,
    of_k: int,
    of_v: int,
    of_out: int,
    stride: int,
    heads: int,
    cos: NDArray[Any],
    sin: NDArray[Any],
    k_pool: NDArray[Any],
    v_pool: NDArray[Any],
    req_to_token: NDArray[Any],
    rows: NDArray[Any],
    context_lengths: NDArray[Any],
    slots: NDArray[Any],
    scale: float,
    window: int,
    soft_cap: float,
    q_norm: NDArray[Any] | None,
    k_norm: NDArray[Any] | None,
    eps: float,
    first: int,
    last: int,
) -> None:
    """The pairs of sequence and KV head from `first` to before `last`.

    `of_q`, `of_k` and `of_v` are addresses, `stride` is the distance in bytes between sequences there. Heads follow
    each other. `of_out` is the address of [sequences, heads, head_dim].
    """
    kv_heads, head_dim = k_pool.shape[1:]
    size = head_dim * k_pool.itemsize
    shared = heads // kv_heads
    head = np.empty(head_dim, k_pool.dtype)
    rotated = np.empty((shared + 1, head_dim), np.float32)
    attended = np.empty(head_dim, np.float32)
    for pair in range(first, last):
        s, kv_head = pair // kv_heads, pair % kv_heads
        context = context_lengths[s]
        if context == 0:
            continue
        seen = min(context, window)
        slot_of = req_to_token[rows[s], context - seen : context]
        weights = np.empty((shared, seen), np.float32)
        key = vector(of_k + s * stride + kv_head * size, head_dim, k_pool)
        value = vector(of_v + s * stride + kv_head * size, head_dim, k_pool)
        if k_norm is not None:
            normed(key, k_norm, eps, head)
            key = head
        _rotate(key, cos[s], sin[s], np.float32(1.0), rotated[shared])
        new_key, new_value = row(k_pool, slots[s], kv_head), row(v_pool, slots[s], kv_head)
        for i in range(head_dim):
            new_key[i] = rounded(rotated[shared, i], k_pool)
            new_value[i] = value[i]
        for h in range(shared):
            query = vector(of_q + s * stride + (kv_head * shared + h) * size, head_dim, k_pool)
            if q_norm is not None:
                normed(query, q_norm, eps, head)
                query = head
            _rotate(query, cos[s], sin[s], np.float32(scale), rotated[h])
        for position in range(seen):
            cached = row(k_pool, slot_of[position], kv_head)
            for h in range(shared):
                score = np.float32(0.0)
                for i in range(head_dim):
                    score += rotated[h, i] * load(cached[i])
                weights[h, position] = score
        for h in range(shared):
            if soft_cap > 0.0:  # tanh(y) = 1 - 2 / (1 + e^(2 y))
                doubled = np.float32(2.0 / soft_cap)
                for position in range(seen):
                    tanh = np.float32(1.0) - np.float32(2.0) / (np.float32(1.0) + exp(weights[h, position] * doubled))
                    weights[h, position] = np.float32(soft_cap) * tanh
            largest = weights[h].max()
            total = np.float32(0.0)
            for position in range(seen):
                weight = exp(weights[h, position] - largest)
                weights[h, position] = weight
                total += weight
            attended[:] = 0.0
            for position in range(seen):
                value = row(v_pool, slot_of[position], kv_head)
                for i in range(head_dim):
                    attended[i] += weights[h, position] * load(value[i])
            out = vector(of_out + (s * heads + kv_head * shared + h) * size, head_dim, k_pool)
            for i in range(head_dim):
                out[i] = rounded(attended[i] / total, k_pool)


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
    is_plain = alibi_slopes is None and scales is None
    is_plain = is_plain and q.stride() == k.stride() == v.stride() and q.stride()[1:] == (q.shape[2], 1)
    if not (is_plain and q.dtype == k_pool.dtype and q.dtype in DTYPES):
        return reference.token_attention(
            q, k, v, cos, sin, slots, k_pool, v_pool, req_to_token, rows, context_lengths, max_context_length, scale,
            alibi_slopes, window, scales, out, memo, norm, soft_cap,
        )  # fmt: skip
    out = q.new_zeros(q.shape) if out is None else out
    rotation = once(memo, "arrays of the rotation", lambda: (array(cos), array(sin)))
    tables = once(
        memo, "arrays of decodes", lambda: (array(req_to_token), array(rows), array(context_lengths), array(slots))
    )
    pools = lasting_array(k_pool), lasting_array(v_pool)
    is_much = once(memo, "many tokens", lambda: int(context_lengths.sum()) >= _MANY_CONTEXT_TOKENS)
    norms = (None, None, 0.0) if norm is None else (lasting_array(norm.q), lasting_array(norm.k), norm.eps)
    options = window or max_context_length, soft_cap, *norms
    addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    arguments = *addresses, q.stride(0) * q.element_size(), q.shape[1], *rotation, *pools, *tables, scale, *options
    in_parts(_attend, arguments, k.shape[0] * k.shape[1], is_much)
    return out
