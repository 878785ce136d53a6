# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Layer norm, fused with the addition to the residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, start_next, wait_for_previous
from lightllm_backend.kernels.quantized.choice import starts_early, takes_rounded
from lightllm_backend.kernels.quantized.quantize_tokens import rounded_row
from lightllm_backend.kernels.quantized.rounded_tokens import Activations, RoundedTokens
from lightllm_backend.kernels.quantized.weight import LIMITS, MIN_INPUT_SCALE, QuantizedWeight, Weight
from lightllm_backend.kernels.sizes import next_power_of_2


@triton.jit(do_not_specialize=["tokens"])
def layer_norm_kernel(
    x,
    weight,
    bias,
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
    is_rounded: tl.constexpr,
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
    scale = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=live, other=0.0).to(tl.float32)
    if has_residual:
        residual_row = residual + token * residual_stride + column
        # Before the wait: the previous kernel must not write the residual.
        before = tl.load(residual_row, mask=live, other=0.0).to(tl.float32)
    wait_for_previous(is_dependent)
    value = tl.zeros([block], dtype=tl.float32)
    for part in tl.static_range(parts):
        address = x + (part * tokens + token) * x_stride + column
        value += tl.load(address, mask=live, other=0.0).to(tl.float32)
    if has_residual:
        total = (before + value).to(residual.dtype.element_ty)
        tl.store(residual_row, total, mask=live)
        value = total.to(tl.float32)
    centred = tl.where(live, value - tl.sum(value, 0) / dim, 0.0)
    normalized = centred * tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
    normed = normalized * scale + shift
    if is_rounded:
        normed = tl.where(live, normed.to(weight.dtype.element_ty).to(tl.float32), 0.0)
        row, row_scale = rounded_row(
            normed, input_scale, limit, min_scale, out.dtype.element_ty, is_static, in_fragments, block
        )
        tl.store(out_scales + token, row_scale)
    else:
        row = normed.to(out.dtype.element_ty)
    tl.store(out + token * out_stride + column, row, mask=live)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    reader: Weight | None = None,
) -> Activations:
    if takes_rounded(reader, x.shape[-2], weight.dtype):
        return rounded_layer_norm(x, weight, bias, eps, residual, reader)
    out = torch.empty(x.shape[-2:], dtype=weight.dtype, device=x.device)
    launch_layer_norm(x, weight, bias, eps, residual, out, None, reader)
    return out


def rounded_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, reader: QuantizedWeight
) -> RoundedTokens:
    """quantize_tokens, for `reader`, of the norm. The reader has one group."""
    rounded = RoundedTokens.empty(x.shape[-2], reader, weight.dtype)
    launch_layer_norm(x, weight, bias, eps, residual, rounded.values, rounded.scales, reader)
    return rounded


def launch_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    reader: Weight | None,
) -> None:
    """Write the norm to `out` [tokens, dim], or, with `scales` [tokens], what it is rounded to for `reader`."""
    tokens, dim = x.shape[-2:]
    parts = x.shape[0] if x.dim() == 3 else 1
    assert x.stride(-1) == 1
    assert parts == 1 or x.stride(0) == tokens * x.stride(1)
    assert weight.is_contiguous()
    assert bias.is_contiguous()
    added = x if residual is None else residual
    assert added.stride(-1) == 1
    if tokens == 0:
        return
    quantized = reader if isinstance(reader, QuantizedWeight) else None
    input_scale = None if quantized is None or scales is None else quantized.input_scale
    block = next_power_of_2(dim)
    layer_norm_kernel[(tokens,)](
        x,
        weight,
        bias,
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
        0.0 if scales is None else LIMITS[out.dtype],
        MIN_INPUT_SCALE,
        parts=parts,
        has_residual=residual is not None,
        is_rounded=scales is not None,
        is_static=input_scale is not None,
        in_fragments=quantized is not None and quantized.in_fragments,
        block=block,
        num_warps=min(16, max(1, block // 256)),
        is_early=starts_early(reader),  # see rms_norm
        **dependent_launch(x.device),
    )
