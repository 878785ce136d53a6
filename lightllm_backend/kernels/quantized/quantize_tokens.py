# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Rounds activations to 8 bits, with a scale for each token, or for each group of its columns, or for all."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.quantized.weight import LIMITS, MIN_INPUT_SCALE, QuantizedWeight

_MAX_BLOCK = 2048


@triton.jit
def quantize_tokens_kernel(
    x,
    values,
    scales,
    input_scale,
    in_features,
    group_size,
    x_stride,
    limit,
    min_scale,
    is_static: tl.constexpr,
    is_int8: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    """Rounds one group of a token's columns, in two passes over it if the scale depends on them."""
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * group_size
    last = tl.minimum(first + group_size, in_features)
    wait_for_previous(is_dependent)
    if is_static:
        scale = tl.load(input_scale)
    else:
        largest = tl.zeros([block], dtype=tl.float32)
        for start in range(first, last, block):
            column = start + tl.arange(0, block)
            value = tl.load(x + token * x_stride + column, mask=column < last, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(value))
        scale = tl.maximum(tl.div_rn(tl.max(largest, 0), limit), min_scale)
    tl.store(scales + token * tl.num_programs(1) + tl.program_id(1), scale)
    for start in range(first, last, block):
        column = start + tl.arange(0, block)
        value = tl.load(x + token * x_stride + column, mask=column < last, other=0.0).to(tl.float32)
        value = tl.div_rn(value, tl.zeros([block], dtype=tl.float32) + scale)
        value = tl.minimum(tl.maximum(value, -limit), limit)
        if is_int8:  # near 1.5 * 2**23 a float32 has no fraction bits: this rounds half to even
            value = (value + 12582912.0) - 12582912.0
        tl.store(values + token * in_features + column, value.to(values.dtype.element_ty), mask=column < last)


def quantize_tokens(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    tokens, in_features = x.shape
    groups, dtype = len(weight.scales), weight.values.dtype
    values = torch.empty((tokens, in_features), dtype=dtype, device=x.device)
    scales = torch.empty((tokens, groups), dtype=torch.float32, device=x.device)
    assert x.stride(1) == 1
    if tokens > 0:
        quantize_tokens_kernel[(tokens, groups)](
            x,
            values,
            scales,
            scales if weight.input_scale is None else weight.input_scale,
            in_features,
            weight.group_size,
            x.stride(0),
            LIMITS[dtype],
            MIN_INPUT_SCALE,
            is_static=weight.input_scale is not None,
            is_int8=dtype == torch.int8,
            block=min(_MAX_BLOCK, triton.next_power_of_2(weight.group_size)),
            num_warps=4,
            **dependent_launch(x.device),
        )
    return values, scales
