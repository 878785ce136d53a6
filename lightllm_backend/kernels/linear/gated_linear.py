# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The first half of a gated feed-forward layer, silu(gate(x)) * up(x) or gelu(gate(x)) * up(x), by the kernel that
choice.py names.

The kernel of this file is for up to 64 tokens: it reads both weights in one pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.activation.gate import activated
from lightllm_backend.kernels.activation.silu_and_mul import MAX_ROUNDED, rounded_silu_and_mul, silu_and_mul
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import has_ptx
from lightllm_backend.kernels.linear import gated_tiles
from lightllm_backend.kernels.linear.choice import MAX_UNFUSED_TOKENS, Choice, ProductKernel, choice_for
from lightllm_backend.kernels.linear.linear import linear
from lightllm_backend.kernels.linear.linear_tiles import launch_tiles
from lightllm_backend.kernels.quantized.choice import takes_rounded
from lightllm_backend.kernels.quantized.dequantize import dequantize
from lightllm_backend.kernels.quantized.product import multiplies_8_bits, quantized_gated
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import QuantizedWeight, Weight
from lightllm_backend.kernels.sizes import next_power_of_2


@triton.jit(do_not_specialize=["tokens"])
def gated_linear_kernel(
    x,
    weight,
    bias,
    out,
    tokens,
    features,
    in_features,
    x_stride,
    has_bias: tl.constexpr,
    is_gelu: tl.constexpr,
    is_ptx: tl.constexpr,
    is_dependent: tl.constexpr,
    block_tokens: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """Computes a block of features for all tokens. Half of the tile's rows belong to the gate, half to `up`."""
    half: tl.constexpr = block_out // 2
    block = tl.program_id(0).to(tl.int64) * half
    row = tl.arange(0, block_out)
    token = tl.arange(0, block_tokens)
    inner = tl.arange(0, block_inner)
    live = (token < tokens)[None, :]
    wait_for_previous(is_dependent)
    weight_row = block + row % half + (row // half) * features
    weight_block = weight + weight_row[:, None] * in_features + inner[None, :]
    x_block = x + token[None, :] * x_stride + inner[:, None]
    total = tl.zeros([block_out, block_tokens], dtype=tl.float32)
    for first in range(0, in_features, block_inner):
        total = tl.dot(tl.load(weight_block + first), tl.load(x_block + first, mask=live, other=0.0), total)
    if has_bias:
        total += tl.load(bias + weight_row).to(tl.float32)[:, None]
    gate, up = tl.split(total.reshape(2, half, block_tokens).permute(1, 2, 0))
    address = out + token[None, :] * features + (block + tl.arange(0, half))[:, None]
    tl.store(address, (activated(gate, is_gelu, is_ptx) * up).to(out.dtype.element_ty), mask=live)


def gated_linear(
    x: Activations,
    weight: Weight,
    bias: Tensor | None = None,
    is_gelu: bool = False,
    reader: Weight | None = None,
) -> Activations:
    if isinstance(weight, QuantizedWeight):
        gated = quantized_gated(x, weight, bias, is_gelu)
        if gated is not None:
            return gated
        if x.shape[0] <= MAX_UNFUSED_TOKENS or multiplies_8_bits(weight, weight.values.device):
            return _activated(linear(x, weight, bias), is_gelu, reader)
        assert isinstance(x, Tensor)
        x, weight = weight.order_input(x), dequantize(weight, x.dtype)
    tokens, features = x.shape[0], weight.shape[0] // 2
    assert isinstance(x, Tensor)
    assert isinstance(weight, Tensor)
    choice = choice_for(x, weight, bias, is_gated=True)
    if choice.kernel is ProductKernel.GATED_TILES:
        return gated_tiles.gated_tiles(x, weight, is_gelu)
    if choice.kernel is ProductKernel.UNFUSED:
        return silu_and_mul(linear(x, weight, bias), is_gelu)
    out = torch.empty((tokens, features), dtype=x.dtype, device=x.device)
    launch_gated(x, weight, bias, out, choice, is_gelu)
    return out


def _activated(gate_up: Tensor, is_gelu: bool, reader: Weight | None) -> Activations:
    if gate_up.shape[1] <= 2 * MAX_ROUNDED and takes_rounded(reader, gate_up.shape[0], gate_up.dtype):
        return rounded_silu_and_mul(gate_up, is_gelu, reader)
    return silu_and_mul(gate_up, is_gelu)


def launch_gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, choice: Choice, is_gelu: bool = False
) -> None:
    """Write the result to `out` [tokens, features]; `weight` is [2 * features, in_features]."""
    blocks = choice.blocks
    assert blocks is not None
    tokens, in_features = x.shape
    features = out.shape[1]
    if choice.kernel is ProductKernel.PREFETCH:
        from lightllm_backend.kernels.linear.linear_prefetch import launch_prefetch  # not every Triton-lang has Gluon

        launch_prefetch(x, weight, bias, out.unsqueeze(0), blocks, is_gated=True, is_gelu=is_gelu)
        return
    if choice.kernel is ProductKernel.TILES:
        launch_tiles(x, weight, bias, out.unsqueeze(0), blocks, is_gated=True, is_gelu=is_gelu)
        return
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert out.is_contiguous()
    gated_linear_kernel[(2 * features // blocks.out,)](
        x,
        weight,
        x if bias is None else bias,
        out,
        tokens,
        features,
        in_features,
        x.stride(0),
        has_bias=bias is not None,
        is_gelu=is_gelu,
        is_ptx=has_ptx(x.device),
        block_tokens=max(16, next_power_of_2(tokens)),
        block_out=blocks.out,
        block_inner=blocks.inner,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **dependent_launch(x.device),
    )
