# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Sums the parts of a product whose inner dimension was split."""

import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.sizes import cdiv

_BLOCK = 1024


@triton.jit
def sum_splits_kernel(parts, out, count, splits: tl.constexpr, is_dependent: tl.constexpr, block: tl.constexpr):
    wait_for_previous(is_dependent)
    element = tl.program_id(0) * block + tl.arange(0, block)
    live = element < count
    total = tl.zeros([block], dtype=tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(parts + split * count + element, mask=live, other=0.0)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=live)


def sum_splits(parts: Tensor, out: Tensor) -> Tensor:
    assert parts.is_contiguous()
    assert out.is_contiguous()
    if out.numel() > 0:
        grid = (cdiv(out.numel(), _BLOCK),)
        launch = dependent_launch(out.device)
        sum_splits_kernel[grid](parts, out, out.numel(), splits=parts.shape[0], block=_BLOCK, num_warps=4, **launch)
    return out
