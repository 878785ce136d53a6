# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products of 8-bit activations with an 8-bit weight, on tensor cores that multiply int8 or fp8."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.quantized.weight import QuantizedWeight
from lightllm_backend.kernels.sizes import cdiv

_TOKENS, _OUT, _INNER = 128, 128, 128


@triton.jit(do_not_specialize=["tokens"])
def scaled_linear_kernel(
    x,
    x_scales,
    values,
    scales,
    bias,
    out,
    tokens,
    out_features,
    in_features,
    group_size,
    is_int8: tl.constexpr,
    is_grouped: tl.constexpr,
    has_bias: tl.constexpr,
    is_dependent: tl.constexpr,
    block_tokens: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """Computes a tile of tokens by output features."""
    sum_type: tl.constexpr = tl.int32 if is_int8 else tl.float32
    token = tl.program_id(0).to(tl.int64) * block_tokens + tl.arange(0, block_tokens)
    row = tl.program_id(1).to(tl.int64) * block_out + tl.arange(0, block_out)
    inner = tl.arange(0, block_inner)
    is_token, is_row = token < tokens, row < out_features
    groups = tl.cdiv(in_features, group_size)
    wait_for_previous(is_dependent)
    part = tl.zeros([block_tokens, block_out], dtype=sum_type)
    total = tl.zeros([block_tokens, block_out], dtype=tl.float32)
    for start in range(0, in_features, block_inner):
        column = start + inner
        is_column = column < in_features
        x_tile = tl.load(
            x + token[:, None] * in_features + column[None, :], mask=is_token[:, None] & is_column[None, :], other=0.0
        )
        tile = tl.load(
            values + row[None, :] * in_features + column[:, None], mask=is_row[None, :] & is_column[:, None], other=0.0
        )
        if is_grouped:
            group = start // group_size
            x_scale = tl.load(x_scales + token * groups + group, mask=is_token, other=0.0)
            scale = tl.load(scales + group * out_features + row, mask=is_row, other=0.0).to(tl.float32)
            product = tl.dot(x_tile, tile, out_dtype=sum_type).to(tl.float32)
            total += product * x_scale[:, None] * scale[None, :]
        else:
            part = tl.dot(x_tile, tile, part, out_dtype=sum_type)
    if not is_grouped:
        x_scale = tl.load(x_scales + token, mask=is_token, other=0.0)
        scale = tl.load(scales + row, mask=is_row, other=0.0).to(tl.float32)
        total = part.to(tl.float32) * x_scale[:, None] * scale[None, :]
    if has_bias:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[None, :]
    address = out + token[:, None] * out_features + row[None, :]
    tl.store(address, total.to(out.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])


def scaled_linear(
    x: Tensor, x_scales: Tensor, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    tokens, (out_features, in_features) = x.shape[0], weight.shape
    groups = weight.num_groups
    out = torch.empty((tokens, out_features), dtype=dtype, device=x.device)
    assert groups == 1 or weight.group_size % _INNER == 0
    assert weight.zeros is None
    assert x.dtype == weight.values.dtype
    assert all(tensor.is_contiguous() for tensor in (x, x_scales, weight.values, weight.scales))
    if tokens > 0:
        scaled_linear_kernel[(cdiv(tokens, _TOKENS), cdiv(out_features, _OUT))](
            x,
            x_scales,
            weight.values,
            weight.scales,
            x_scales if bias is None else bias,
            out,
            tokens,
            out_features,
            in_features,
            weight.group_size,
            is_int8=x.dtype == torch.int8,
            is_grouped=groups > 1,
            has_bias=bias is not None,
            block_tokens=_TOKENS,
            block_out=_OUT,
            block_inner=_INNER,
            num_warps=8,
            num_stages=3,
            **dependent_launch(x.device),
        )
    return out
