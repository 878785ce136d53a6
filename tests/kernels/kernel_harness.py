# SPDX-License-Identifier: Apache-2.0
"""What the kernels' tests share: pools whose unowned slots are poisoned, a naive attention, and a measure of error."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightllm_backend.kernels.attention.head_norm import HeadNorm

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def combinations(*axes: Sequence[Any], every: int) -> list[tuple[Any, ...]]:
    """All combinations on a GPU; one of `every` in the slow interpreter.

    All combinations of the axes but the first are still there, if `every` and their number have no common divisor and
    the first axis has at least `every` values.
    """
    return list(itertools.product(*axes))[:: 1 if torch.cuda.is_available() else every]


def relative_error(out: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))


class Pool(NamedTuple):
    k: Tensor
    v: Tensor
    req_to_token: Tensor
    rows: Tensor
    context_lengths: Tensor
    scales: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Pool":
        """With K and V as numbers of that type, also where they are int8."""
        k, v = self.k.to(dtype), self.v.to(dtype)
        if self.scales is not None:
            k_scales, v_scales = self.scales.to(dtype).unsqueeze(-1).unbind(2)
            k, v = k * k_scales, v * v_scales
        return self._replace(k=k, v=v, scales=None)

    def poisoned(self, slots: Tensor) -> "Pool":
        """A copy with NaN in these slots, whose scales are NaN if it is int8."""
        if self.scales is not None:
            return self._replace(k=self.k.clone(), v=self.v.clone(), scales=self.scales.index_fill(0, slots, torch.nan))
        return self._replace(k=self.k.index_fill(0, slots, torch.nan), v=self.v.index_fill(0, slots, torch.nan))

    def copy(self) -> "Pool":
        return self.poisoned(torch.empty(0, dtype=torch.int64, device=self.k.device))

    def to_int8(self) -> "Pool":
        """Other values, int8; the scales of slots of nobody are NaN."""
        unowned = self.k.isnan().all(-1)
        k, v = (torch.randint_like(x, -127, 128, dtype=torch.int8) for x in (self.k, self.v))
        # Of very different magnitudes, down to the smallest of V that float16 takes.
        magnitudes = 10 ** (-3 * torch.rand(*unowned.shape, 2, device=k.device)) / 60
        return self._replace(k=k, v=v, scales=magnitudes.half().masked_fill(unowned.unsqueeze(-1), torch.nan))


class NewTokens(NamedTuple):
    """What decode attention is given of the last token of each context: K and V of no particular values."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor

    def to(self, dtype: torch.dtype) -> "NewTokens":
        return self._replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


def new_tokens(pool: Pool, heads: int, dtype: torch.dtype, rotary_dim: int = 0) -> tuple[NewTokens, Pool]:
    """Views of a fused tensor, and the pool without what they are to write. Where there is no context, a padding."""
    (_, kv_heads, head_dim), device = pool.k.shape, pool.k.device
    contexts = pool.context_lengths.tolist()
    fused = torch.randn(len(contexts), heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    angle = torch.randn(len(contexts), rotary_dim // 2, device=device) * 7
    places = [
        int(pool.req_to_token[row, context - 1]) if context else -1
        for row, context in zip(pool.rows.tolist(), contexts, strict=True)
    ]
    slots = torch.tensor(places, device=device, dtype=torch.int32)
    new = NewTokens(*fused.split((heads, kv_heads, kv_heads), 1), angle.cos(), angle.sin(), slots)
    return new, pool.poisoned(slots[slots >= 0].long())


def head_norm(head_dim: int, dtype: torch.dtype, device: torch.device) -> HeadNorm:
    q, k = (1 + 0.3 * torch.randn(2, head_dim, device=device)).to(dtype)
    return HeadNorm(q, k, 1e-3)


class Variant(NamedTuple):
    """What an attention kernel is asked for beside the plain one."""

    alibi: bool = False
    window: int = 0
    int8: bool = False
    soft_cap: float = 0.0

    def options(self, pool: Pool, heads: int) -> dict[str, Tensor | float | None]:
        slopes = torch.rand(heads, device=pool.k.device) if self.alibi else None
        return {"alibi_slopes": slopes, "window": self.window, "scales": pool.scales, "soft_cap": self.soft_cap}


VARIANTS = [
    Variant(alibi=True),
    Variant(window=1),
    Variant(window=7),
    Variant(window=64),
    Variant(window=1000),
    Variant(int8=True),
    Variant(window=20, soft_cap=1.5),
    Variant(alibi=True, window=20, int8=True, soft_cap=1.5),
]


def make_pool(
    contexts: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, spare_slots: int = 9
) -> Pool:
    """Scattered slots for each context. Slots of nobody hold NaN; the table's unused places name one, slot 0."""
    slot_count = sum(contexts) + spare_slots
    order = 1 + torch.randperm(slot_count - 1)[: sum(contexts)]
    table = torch.zeros((len(contexts) + 3, max([*contexts, 1]) + 5), dtype=torch.int32)
    rows = torch.randperm(len(contexts) + 3)[: len(contexts)].to(torch.int32)
    order = order.to(device)
    k = torch.full((slot_count, kv_heads, head_dim), torch.nan, device=device, dtype=dtype)
    v = torch.full((slot_count, kv_heads, head_dim), torch.nan, device=device, dtype=dtype)
    start = 0
    for row, context in zip(rows.tolist(), contexts, strict=True):
        table[row, :context] = order[start : start + context]
        start += context
    k[order] = torch.randn(len(order), kv_heads, head_dim, device=device).to(dtype)
    v[order] = torch.randn(len(order), kv_heads, head_dim, device=device).to(dtype)
    lengths = torch.tensor(contexts, dtype=torch.int32)
    return Pool(k, v, table.to(device), rows.to(device), lengths.to(device))


def split_new(pool: Pool, queries: list[int], tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Pool]:
    """K and V of the last `queries` tokens of each context as prefill is given them, padded with NaN to `tokens`, and
    the pool with NaN in their place: nobody may read them there."""
    slots = [
        pool.req_to_token[row, context - count : context].long()
        for row, context, count in zip(pool.rows.tolist(), pool.context_lengths.tolist(), queries, strict=True)
    ]
    new = torch.cat(slots)
    wide = pool.to(dtype)
    fused = torch.full((tokens, 2, *pool.k.shape[1:]), torch.nan, dtype=dtype, device=pool.k.device)
    fused[: len(new), 0], fused[: len(new), 1] = wide.k[new], wide.v[new]
    return fused[:, 0], fused[:, 1], pool.poisoned(new)


def naive_attention(
    q: Tensor,
    pool: Pool,
    query_lengths: list[int],
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    **_scales: Tensor | None,
) -> Tensor:
    """Softmax attention in float64, query by query; `q` is packed by `query_lengths`."""
    group = q.shape[1] // pool.k.shape[1]
    pool = pool.to(torch.float64)
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    token = 0
    for sequence, queries in enumerate(query_lengths):
        context = int(pool.context_lengths[sequence])
        slots = pool.req_to_token[int(pool.rows[sequence]), :context].long()
        for index in range(queries):
            position = context - queries + index
            seen = slots[max(0, position - window + 1) if window else 0 : position + 1]
            if len(seen):
                k = pool.k[seen].repeat_interleave(group, 1)
                v = pool.v[seen].repeat_interleave(group, 1)
                scores = torch.einsum("hd,thd->ht", q[token].double(), k) * scale
                if soft_cap > 0:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if alibi_slopes is not None:
                    scores += alibi_slopes.double()[:, None] * torch.arange(len(seen), device=q.device)
                out[token] = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
            token += 1
    return out


def starts_of(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
