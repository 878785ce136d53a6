# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Root-mean-square norm, fused with the addition to the residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, start_next, wait_for_previous
from lightllm_backend.kernels.quantized.choice import pair_dtype, starts_early, takes_paired, takes_rounded
from lightllm_backend.kernels.quantized.quantize_tokens import paired_row, rounded_row
from lightllm_backend.kernels.quantized.rounded_tokens import (
    PAIR_FACTORS,
    PAIR_LIMITS,
    Activations,
    PairedTokens,
    RoundedTokens,
)
from lightllm_backend.kernels.quantized.weight import LIMITS, MIN_INPUT_SCALE, QuantizedWeight, Weight
from lightllm_backend.kernels.sizes import next_power_of_2

FEW_TOKENS = 4


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
    out_scales,
    input_scale,
    x_stride,
    residual_stride,
    out_stride,
    tokens,
    dim,
    eps,
    limit,
    min_scale,
    parts: tl.constexpr,
    has_residual: tl.constexpr,
    has_post_norm: tl.constexpr,
    is_rounded: tl.constexpr,
    is_paired: tl.constexpr,
    factor: tl.constexpr,
    is_static: tl.constexpr,
    in_fragments: tl.constexpr,
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
    if is_paired:
        normed = normed.to(residual.dtype.element_ty).to(tl.float32)
        high, low, row_scale = paired_row(normed, limit, factor, min_scale, out.dtype.element_ty, block)
        tl.store(out_scales + token, row_scale)
        tl.store(out + 2 * token * out_stride + column, high, mask=live)
        tl.store(out + (2 * token + 1) * out_stride + column, low, mask=live)
    elif is_rounded:
        normed = normed.to(residual.dtype.element_ty).to(tl.float32)
        row, row_scale = rounded_row(
            normed, input_scale, limit, min_scale, out.dtype.element_ty, is_static, in_fragments, block
        )
        tl.store(out_scales + token, row_scale)
        tl.store(out + token * out_stride + column, row, mask=live)
    else:
        tl.store(out + token * out_stride + column, normed.to(out.dtype.element_ty), mask=live)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    post_weight: Tensor | None = None,
    reader: Weight | None = None,
) -> Activations:
    if takes_paired(reader, x.shape[-2], x.dtype if residual is None else residual.dtype):
        return paired_rms_norm(x, weight, eps, residual, post_weight, reader)
    if takes_rounded(reader, x.shape[-2], x.dtype if residual is None else residual.dtype):
        return rounded_rms_norm(x, weight, eps, residual, post_weight, reader)
    out = torch.empty(x.shape[-2:], dtype=(x if residual is None else residual).dtype, device=x.device)
    launch_rms_norm(x, weight, eps, residual, post_weight, out, None, reader)
    return out


def rounded_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    post_weight: Tensor | None,
    reader: QuantizedWeight,
) -> RoundedTokens:
    """quantize_tokens, for `reader`, of the norm. The reader has one group."""
    rounded = RoundedTokens.empty(x.shape[-2], reader, x.dtype if residual is None else residual.dtype)
    launch_rms_norm(x, weight, eps, residual, post_weight, rounded.values, rounded.scales, reader)
    return rounded


def paired_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    post_weight: Tensor | None,
    reader: QuantizedWeight,
) -> PairedTokens:
    """The norm as pairs of 8-bit numbers, for `reader`."""
    tokens, dim = x.shape[-2:]
    out = torch.empty((2 * tokens, dim), dtype=pair_dtype(reader), device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    launch_rms_norm(x, weight, eps, residual, post_weight, out, scales, reader, is_paired=True)
    return PairedTokens(out, scales, x.dtype if residual is None else residual.dtype)


def launch_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    post_weight: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    reader: Weight | None,
    is_paired: bool = False,
) -> None:
    """Write the norm to `out` [tokens, dim], or, with `scales` [tokens], what it is rounded to for `reader`."""
    tokens, dim = x.shape[-2:]
    parts = x.shape[0] if x.dim() == 3 else 1
    assert x.stride(-1) == 1
    assert parts == 1 or x.stride(0) == tokens * x.stride(1)
    assert weight.is_contiguous()
    assert post_weight is None or (residual is not None and post_weight.is_contiguous())
    added = x if residual is None else residual
    assert added.stride(-1) == 1
    if tokens == 0:
        return
    quantized = reader if isinstance(reader, QuantizedWeight) else None
    input_scale = None if quantized is None or scales is None or is_paired else quantized.input_scale
    block = next_power_of_2(dim)
    rms_norm_kernel[(tokens,)](
        x,
        weight,
        weight if post_weight is None else post_weight,
        added,
        out,
        out if scales is None else scales,
        weight if input_scale is None else input_scale,
        x.stride(-2),
        added.stride(-2),
        out.stride(0),
        tokens,
        dim,
        eps,
        0.0 if scales is None else PAIR_LIMITS[out.dtype] if is_paired else LIMITS[out.dtype],
        MIN_INPUT_SCALE,
        parts=parts,
        has_residual=residual is not None,
        has_post_norm=post_weight is not None,
        is_rounded=scales is not None and not is_paired,
        is_paired=is_paired,
        factor=PAIR_FACTORS[out.dtype] if is_paired else 0.0,
        is_static=input_scale is not None,
        in_fragments=quantized is not None and quantized.in_fragments,
        block=block,
        # A row of few has a multiprocessor to itself: 0.4 us less a layer of 7B in fp8.
        num_warps=min(32, max(1, block // 128)) if tokens <= FEW_TOKENS else min(16, max(1, block // 256)),
        # linear_prefetch would only take the place of what runs: 3.55 instead of 3.50 ms for a step of 7B in 16 bits.
        is_early=starts_early(reader),
        **dependent_launch(x.device),
    )
