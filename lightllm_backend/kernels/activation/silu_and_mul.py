# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""SiLU, or GELU, and product: the activation of a gated feed-forward layer."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.activation.gate import activated
from lightllm_backend.kernels.dependent_launch import dependent_launch, start_next, wait_for_previous
from lightllm_backend.kernels.hardware import has_ptx
from lightllm_backend.kernels.quantized.quantize_tokens import rounded_part, token_scale
from lightllm_backend.kernels.quantized.rounded_tokens import RoundedTokens
from lightllm_backend.kernels.quantized.weight import LIMITS, MIN_INPUT_SCALE, QuantizedWeight
from lightllm_backend.kernels.sizes import cdiv, next_power_of_2

_BLOCK = 1024
# The least and the most features of a token that one program rounds.
MIN_ROUNDED, MAX_ROUNDED = 64, 32768


@triton.jit
def silu_and_mul_kernel(
    gate_up,
    out,
    gate_up_stride,
    out_stride,
    features,
    is_gelu: tl.constexpr,
    is_ptx: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
):
    wait_for_previous(is_dependent)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    live = column < features
    address = gate_up + token * gate_up_stride + column
    gate = tl.load(address, mask=live, other=0.0).to(tl.float32)
    up = tl.load(address + features, mask=live, other=0.0).to(tl.float32)
    result = (activated(gate, is_gelu, is_ptx) * up).to(out.dtype.element_ty)
    tl.store(out + token * out_stride + column, result, mask=live)


@triton.jit
def _activated_part(gate, up, dtype: tl.constexpr, is_gelu: tl.constexpr, is_ptx: tl.constexpr):
    """What silu_and_mul_kernel writes of numbers of `dtype`, as float32."""
    return (activated(gate.to(tl.float32), is_gelu, is_ptx) * up.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit
def rounded_silu_and_mul_kernel(
    gate_up,
    out,
    scales,
    input_scale,
    gate_up_stride,
    features,
    limit,
    min_scale,
    is_gelu: tl.constexpr,
    is_ptx: tl.constexpr,
    is_static: tl.constexpr,
    in_fragments: tl.constexpr,
    is_dependent: tl.constexpr,
    block: tl.constexpr,
    rest: tl.constexpr,
):
    """Rounds one token's features: those of a block, and of another that has the rest, if there are more."""
    start_next(is_dependent)
    wait_for_previous(is_dependent)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    live = column < features
    address = gate_up + token * gate_up_stride + column
    gate = tl.load(address, mask=live, other=0.0)
    up = tl.load(address + features, mask=live, other=0.0)
    if rest > 0:
        rest_column = block + tl.arange(0, rest)
        rest_live = rest_column < features
        rest_address = gate_up + token * gate_up_stride + rest_column
        rest_gate = tl.load(rest_address, mask=rest_live, other=0.0)
        rest_up = tl.load(rest_address + features, mask=rest_live, other=0.0)
    dtype: tl.constexpr = gate_up.dtype.element_ty
    value = _activated_part(gate, up, dtype, is_gelu, is_ptx)
    greatest = tl.max(tl.abs(value), 0)
    if rest > 0:
        rest_value = _activated_part(rest_gate, rest_up, dtype, is_gelu, is_ptx)
        greatest = tl.maximum(greatest, tl.max(tl.abs(rest_value), 0))
    scale = token_scale(greatest, input_scale, limit, min_scale, is_static)
    tl.store(scales + token, scale)
    out_type: tl.constexpr = out.dtype.element_ty
    row = rounded_part(value, scale, limit, out_type, is_static, in_fragments, block)
    tl.store(out + token * features + column, row, mask=live)
    if rest > 0:
        row = rounded_part(rest_value, scale, limit, out_type, is_static, in_fragments, rest)
        tl.store(out + token * features + rest_column, row, mask=rest_live)


def silu_and_mul(gate_up: Tensor, is_gelu: bool = False) -> Tensor:
    tokens, features = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = torch.empty((tokens, features), dtype=gate_up.dtype, device=gate_up.device)
    if tokens == 0:
        return out
    grid = (tokens, cdiv(features, _BLOCK))
    silu_and_mul_kernel[grid](
        gate_up,
        out,
        gate_up.stride(0),
        out.stride(0),
        features,
        is_gelu=is_gelu,
        is_ptx=has_ptx(out.device),
        block=_BLOCK,
        num_warps=4,
        **dependent_launch(out.device),
    )
    return out


def rounded_silu_and_mul(gate_up: Tensor, is_gelu: bool, reader: QuantizedWeight) -> RoundedTokens:
    """quantize_tokens, for `reader`, of silu_and_mul. The reader has one group."""
    tokens, features = gate_up.shape[0], gate_up.shape[1] // 2
    rounded = RoundedTokens.empty(tokens, reader, gate_up.dtype)
    out, scales = rounded.values, rounded.scales
    # Two blocks if these have fewer idle columns than one.
    block = max(MIN_ROUNDED, next_power_of_2(features + 1) // 2)
    rest = max(MIN_ROUNDED, next_power_of_2(features - block)) if features > block else 0
    if rest == block:
        block, rest = 2 * block, 0
    if tokens > 0:
        rounded_silu_and_mul_kernel[(tokens,)](
            gate_up,
            out,
            scales,
            scales if reader.input_scale is None else reader.input_scale,
            gate_up.stride(0),
            features,
            LIMITS[out.dtype],
            MIN_INPUT_SCALE,
            is_gelu=is_gelu,
            is_ptx=has_ptx(out.device),
            is_static=reader.input_scale is not None,
            in_fragments=reader.in_fragments,
            block=block,
            rest=rest,
            num_warps=min(16, max(4, block // 1024)),
            **dependent_launch(out.device),
        )
    return rounded
