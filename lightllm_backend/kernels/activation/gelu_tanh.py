# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""GELU approximated by tanh, the activation of BLOOM's feed-forward layer."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.activation.gate import activated
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import has_ptx
from lightllm_backend.kernels.sizes import cdiv

_BLOCK = 1024


@triton.jit
def gelu_tanh_kernel(
    x,
    out,
    x_stride,
    out_stride,
    features,
    is_ptx: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    wait_for_previous(is_dependent)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    live = column < features
    value = tl.load(x + token * x_stride + column, mask=live, other=0.0).to(tl.float32)
    result = activated(value, True, is_ptx).to(out.dtype.element_ty)
    tl.store(out + token * out_stride + column, result, mask=live)


def gelu_tanh(x: Tensor) -> Tensor:
    tokens, features = x.shape
    assert x.stride(1) == 1
    out = torch.empty((tokens, features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    grid = (tokens, cdiv(features, _BLOCK))
    gelu_tanh_kernel[grid](
        x,
        out,
        x.stride(0),
        out.stride(0),
        features,
        is_ptx=has_ptx(x.device),
        block=_BLOCK,
        num_warps=4,
        **dependent_launch(x.device),
    )
    return out
