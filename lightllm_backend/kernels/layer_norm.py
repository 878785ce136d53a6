# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Layer norm, with the addition to the residual in the same pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def layer_norm_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    x_stride,
    residual_stride,
    out_stride,
    dim,
    eps,
    has_residual: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    live = column < dim
    value = tl.load(x + token * x_stride + column, mask=live, other=0.0).to(tl.float32)
    if has_residual:
        address = residual + token * residual_stride + column
        total = (tl.load(address, mask=live, other=0.0).to(tl.float32) + value).to(residual.dtype.element_ty)
        tl.store(address, total, mask=live)
        value = total.to(tl.float32)
    centred = tl.where(live, value - tl.sum(value, 0) / dim, 0.0)
    normalized = centred * tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
    scale = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + column, (normalized * scale + shift).to(out.dtype.element_ty), mask=live)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    tokens, dim = x.shape
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert bias.is_contiguous()
    added = x if residual is None else residual
    assert added.stride(1) == 1
    out = torch.empty((tokens, dim), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    block = triton.next_power_of_2(dim)
    layer_norm_kernel[(tokens,)](
        x,
        weight,
        bias,
        added,
        out,
        x.stride(0),
        added.stride(0),
        out.stride(0),
        dim,
        eps,
        has_residual=residual is not None,
        block=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out
