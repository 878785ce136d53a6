# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Adds up the parts of a product whose inner dimension was split, with the bias."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def sum_splits_kernel(
    partial, bias, out, tokens, features, splits: tl.constexpr, has_bias: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    live = feature < features
    total = tl.zeros([block], dtype=tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(partial + (split * tokens + token) * features + feature, mask=live, other=0.0)
    if has_bias:
        total += tl.load(bias + feature, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token * features + feature, total.to(out.dtype.element_ty), mask=live)


def sum_splits(partial: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    splits, tokens, features = partial.shape
    assert partial.is_contiguous()
    out = torch.empty((tokens, features), dtype=dtype, device=partial.device)
    if tokens == 0:
        return out
    sum_splits_kernel[(tokens, triton.cdiv(features, _BLOCK))](
        partial,
        partial if bias is None else bias,
        out,
        tokens,
        features,
        splits=splits,
        has_bias=bias is not None,
        block=_BLOCK,
        num_warps=4,
    )
    return out
