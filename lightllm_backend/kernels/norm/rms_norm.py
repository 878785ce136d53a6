# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Root-mean-square norm, fused with the addition to the residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import EARLY, dependent_launch, start_next, wait_for_previous


@triton.jit
def rms_normed(value, scale, eps, dim, weight_type: tl.constexpr):
    """The norm of a row that is 0 behind its `dim` columns, times `scale`: float32."""
    normalized = value * tl.rsqrt(tl.sum(value * value, 0) / dim + eps)
    # Rounded before the product with the weight, as the models were trained.
    return normalized.to(weight_type).to(tl.float32) * scale


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(
    x,
    weight,
    post_weight,
    residual,
    out,
    x_stride,
    residual_stride,
    out_stride,
    tokens,
    dim,
    eps,
    parts: tl.constexpr,
    has_residual: tl.constexpr,
    has_post_norm: tl.constexpr,
    is_dependent: tl.constexpr,
    is_early: tl.constexpr,
    block: tl.constexpr,
):
    start_next(is_dependent and is_early)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    live = column < dim
    weight_type: tl.constexpr = weight.dtype.element_ty
    scale = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    if has_post_norm:
        post_scale = tl.load(post_weight + column, mask=live, other=0.0).to(tl.float32)
    if has_residual:
        residual_row = residual + token * residual_stride + column
        # Before the wait: the previous kernel must not write the residual.
        before = tl.load(residual_row, mask=live, other=0.0).to(tl.float32)
    wait_for_previous(is_dependent)
    value = tl.zeros([block], dtype=tl.float32)
    for part in tl.static_range(parts):
        address = x + (part * tokens + token) * x_stride + column
        value += tl.load(address, mask=live, other=0.0).to(tl.float32)
    if has_post_norm:
        value = rms_normed(value, post_scale, eps, dim, weight_type).to(residual.dtype.element_ty).to(tl.float32)
    if has_residual:
        total = (before + value).to(residual.dtype.element_ty)
        tl.store(residual_row, total, mask=live)
        value = total.to(tl.float32)
    normed = rms_normed(value, scale, eps, dim, weight_type)
    tl.store(out + token * out_stride + column, normed.to(out.dtype.element_ty), mask=live)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, post_weight: Tensor | None = None
) -> Tensor:
    tokens, dim = x.shape[-2:]
    parts = x.shape[0] if x.dim() == 3 else 1
    assert x.stride(-1) == 1
    assert parts == 1 or x.stride(0) == tokens * x.stride(1)
    assert weight.is_contiguous()
    assert post_weight is None or (residual is not None and post_weight.is_contiguous())
    added = x if residual is None else residual
    assert added.stride(-1) == 1
    out = torch.empty((tokens, dim), dtype=added.dtype, device=x.device)
    if tokens == 0:
        return out
    block = triton.next_power_of_2(dim)
    rms_norm_kernel[(tokens,)](
        x,
        weight,
        weight if post_weight is None else post_weight,
        added,
        out,
        x.stride(-2),
        added.stride(-2),
        out.stride(0),
        tokens,
        dim,
        eps,
        parts=parts,
        has_residual=residual is not None,
        has_post_norm=post_weight is not None,
        block=block,
        num_warps=min(16, max(1, block // 256)),
        is_early="rms_norm" in EARLY,
        **dependent_launch(x.device),
    )
    return out
