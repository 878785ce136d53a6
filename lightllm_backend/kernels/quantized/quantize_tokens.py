# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Rounds activations to 8 bits, with a scale for each token, or for each group of its columns, or for all."""

import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, start_next, wait_for_previous
from lightllm_backend.kernels.quantized.rounded_tokens import RoundedTokens
from lightllm_backend.kernels.quantized.weight import LIMITS, MIN_INPUT_SCALE, QuantizedWeight
from lightllm_backend.kernels.sizes import next_power_of_2


@triton.jit
def divided(value, scale):
    """value / scale, float32, correctly rounded as by div_rn but without its branches (Markstein).

    Where a remainder would be subnormal, the quotient's last bit may differ: far below what 8 bits tell from 0.
    """
    inverse = tl.div_rn(1.0, scale)
    quotient = value * inverse
    return tl.fma(tl.fma(quotient, -scale, value), inverse, quotient)


@triton.jit
def token_scale(greatest, input_scale, limit, min_scale, is_static: tl.constexpr):
    """The scale of activations whose magnitudes are at most `greatest`."""
    if is_static:
        return tl.load(input_scale)
    return tl.maximum(tl.div_rn(greatest, limit), min_scale)


@triton.jit
def rounded_part(
    value, scale, limit, dtype: tl.constexpr, is_static: tl.constexpr, in_fragments: tl.constexpr, block: tl.constexpr
):
    """A token's columns, or a group of them, float32 [block], in 8 bits."""
    value = divided(value, scale)
    if is_static:  # else none is beyond the limit by more than rounding makes up for
        # A scale of the checkpoint may be so small that int8 reaches -128.
        value = tl.minimum(tl.maximum(value, -limit - (1.0 if dtype == tl.int8 else 0.0)), limit)
    if dtype == tl.int8:  # near 1.5 * 2**23 a float32 has no fraction bits: this rounds half to even
        value = (value + 12582912.0) - 12582912.0
    row = value.to(dtype)
    if in_fragments:  # by the digits of a column, in fragments.py's words: block, half, thread, second
        digits = tl.reshape(row, (block // 64, 4, 2, 4, 2))
        row = tl.reshape(tl.permute(digits, (0, 3, 1, 4, 2)), (block,))
    return row


@triton.jit
def rounded_row(
    value,
    input_scale,
    limit,
    min_scale,
    dtype: tl.constexpr,
    is_static: tl.constexpr,
    in_fragments: tl.constexpr,
    block: tl.constexpr,
):
    """One group of a token's columns, float32 [block], in 8 bits, and its scale."""
    scale = token_scale(tl.max(tl.abs(value), 0), input_scale, limit, min_scale, is_static)
    return rounded_part(value, scale, limit, dtype, is_static, in_fragments, block), scale


@triton.jit
def paired_row(value, limit, factor, min_scale, dtype: tl.constexpr, block: tl.constexpr):
    """A token's columns, float32 [block], as pairs of 8-bit numbers in the order of PairedTokens, and their scale.

    The scale is a power of two, so that e4m3 loses nothing of bfloat16, as long as it is not 2**13 times smaller than
    the largest.
    """
    least = tl.maximum(tl.max(tl.abs(value), 0) / limit, min_scale).to(tl.uint32, bitcast=True)
    power = (least + 0x7FFFFF) & 0x7F800000  # the next power of two, as a float32's bits
    scale = power.to(tl.float32, bitcast=True)
    value *= (0x7F000000 - power).to(tl.float32, bitcast=True)
    if dtype == tl.int8:
        value = (value + 12582912.0) - 12582912.0  # see rounded_row
        high = tl.floor((value + 128.0) * (1.0 / 256.0))
        low = value - high * 256.0
        # As words of int4 hold them: chunk, word, block's low bit, half, thread, second
        high = tl.reshape(tl.permute(tl.reshape(high, (block // 64, 2, 2, 2, 4, 2)), (0, 1, 3, 4, 5, 2)), (block,))
        low = tl.reshape(tl.permute(tl.reshape(low, (block // 64, 2, 2, 2, 4, 2)), (0, 1, 3, 4, 5, 2)), (block,))
        return high.to(dtype), low.to(dtype), scale
    high = value.to(dtype)
    low = ((value - high.to(tl.float32)) * factor).to(dtype)
    # Fragments.py's words: block, half, thread, second
    high = tl.reshape(tl.permute(tl.reshape(high, (block // 64, 4, 2, 4, 2)), (0, 3, 1, 4, 2)), (block,))
    low = tl.reshape(tl.permute(tl.reshape(low, (block // 64, 4, 2, 4, 2)), (0, 3, 1, 4, 2)), (block,))
    return high, low, scale / factor


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
    in_fragments: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    """Rounds one group of a token's columns."""
    start_next(is_dependent)
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * group_size
    last = tl.minimum(first + group_size, in_features)
    column = first + tl.arange(0, block)
    wait_for_previous(is_dependent)
    value = tl.load(x + token * x_stride + column, mask=column < last, other=0.0).to(tl.float32)
    rounded, scale = rounded_row(
        value, input_scale, limit, min_scale, values.dtype.element_ty, is_static, in_fragments, block
    )
    tl.store(scales + token * tl.num_programs(1) + tl.program_id(1), scale)
    tl.store(values + token * in_features + column, rounded, mask=column < last)


def quantize_tokens(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    tokens, in_features = x.shape
    groups, dtype = weight.num_groups, weight.values.dtype
    rounded = RoundedTokens.empty(tokens, weight, x.dtype)
    values, scales = rounded.values, rounded.scales
    assert x.stride(1) == 1
    block = next_power_of_2(min(weight.group_size, in_features))
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
            in_fragments=weight.in_fragments,
            block=block,
            num_warps=min(16, max(4, block // 1024)),
            **dependent_launch(x.device),
        )
    return values, scales
