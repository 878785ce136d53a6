# SPDX-License-Identifier: Apache-2.0
"""What the kernels' tests share: pools whose unowned slots are poisoned, a naive attention, and a measure of error."""

from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def relative_error(out: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))


class Pool(NamedTuple):
    k: Tensor
    v: Tensor
    req_to_token: Tensor
    rows: Tensor
    context_lengths: Tensor

    def to(self, dtype: torch.dtype) -> "Pool":
        return self._replace(k=self.k.to(dtype), v=self.v.to(dtype))


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


def naive_attention(q: Tensor, pool: Pool, query_lengths: list[int], scale: float) -> Tensor:
    """Softmax attention in float64, query by query; `q` is packed by `query_lengths`."""
    group = q.shape[1] // pool.k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    token = 0
    for sequence, queries in enumerate(query_lengths):
        context = int(pool.context_lengths[sequence])
        slots = pool.req_to_token[int(pool.rows[sequence]), :context].long()
        for index in range(queries):
            seen = slots[: context - queries + index + 1]
            if len(seen):
                k = pool.k[seen].double().repeat_interleave(group, 1)
                v = pool.v[seen].double().repeat_interleave(group, 1)
                weights = (torch.einsum("hd,thd->ht", q[token].double(), k) * scale).softmax(-1)
                out[token] = torch.einsum("ht,thd->hd", weights, v)
            token += 1
    return out


def starts_of(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
