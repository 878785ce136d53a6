# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products of few tokens with a weight of 4 or 8 bits, bounded by the time to read the weight.

As in linear_splits, the weight is the left operand, and the inner dimension is split where the output features are too
few to occupy the GPU. Weights enter the tensor cores as whole numbers, or as fp8's own, which 16 bits hold exactly; the
scales multiply the sums of each group in float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import multiprocessor_count
from lightllm_backend.kernels.linear.choice import MIN_PROGRAM_SHARE
from lightllm_backend.kernels.quantized.dequantize import dequantize
from lightllm_backend.kernels.quantized.load_tile import FP8_UNIT, load_tile, tile_arguments
from lightllm_backend.kernels.quantized.weight import QuantizedWeight
from lightllm_backend.kernels.sizes import cdiv, next_power_of_2

# The tokens of a tile; product.py sends products of more to other kernels.
MAX_TILE_TOKENS = 64


class Blocks(NamedTuple):
    """A program's tile of the weight, rows and columns, and how many splits the inner dimension has."""

    out: int
    inner: int
    splits: int


@triton.jit(do_not_specialize=["tokens"])
def quantized_splits_kernel(
    x,
    values,
    scales,
    zeros,
    bias,
    out,
    tokens,
    out_features,
    in_features,
    split_features,
    group_size,
    x_stride,
    is_int4: tl.constexpr,
    is_fp8: tl.constexpr,
    has_zeros: tl.constexpr,
    in_fragments: tl.constexpr,
    is_grouped: tl.constexpr,
    has_bias: tl.constexpr,
    is_dependent: tl.constexpr,
    block_tokens: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """Computes a block of output features for a block of tokens, over one split of the inner dimension."""
    row = tl.program_id(0).to(tl.int64) * block_out + tl.arange(0, block_out)
    split = tl.program_id(1)
    token = tl.program_id(2) * block_tokens + tl.arange(0, block_tokens)
    inner = tl.arange(0, block_inner)
    live = row < out_features
    first = split * split_features
    last = tl.minimum(first + split_features, in_features)
    total = tl.zeros([block_out, block_tokens], dtype=tl.float32)
    wait_for_previous(is_dependent)
    for start in range(first, last, block_inner):
        group = start // group_size
        tile = load_tile(
            values, zeros, row, start, group, out_features, in_features, x.dtype.element_ty,
            is_int4, is_fp8, has_zeros, in_fragments, block_inner,
        )  # fmt: skip
        column = start + inner
        x_tile = tl.load(
            x + token[None, :] * x_stride + column[:, None],
            mask=(token < tokens)[None, :] & (column < last)[:, None],
            other=0.0,
        )
        if is_grouped:
            scale = tl.load(scales + group * out_features + row, mask=live, other=0.0).to(tl.float32)
            total += tl.dot(tile, x_tile) * scale[:, None]
        else:
            total = tl.dot(tile, x_tile, total)
    if not is_grouped:
        total *= tl.load(scales + row, mask=live, other=0.0).to(tl.float32)[:, None]
    if is_fp8:
        total *= FP8_UNIT
    if has_bias:
        added = tl.load(bias + row, mask=live, other=0.0).to(tl.float32)
        total += tl.where(split == 0, added, 0.0)[:, None]
    address = out + (split * tokens + token[None, :]) * out_features + row[:, None]
    tl.store(address, total.to(out.dtype.element_ty), mask=live[:, None] & (token < tokens)[None, :])


def choose_blocks(weight: QuantizedWeight, x: Tensor) -> Blocks | None:
    """Blocks that lie within the weight's groups; None: the groups are too odd for tensor cores, or x is float32.

    As in linear.choice, the inner dimension is split until most multiprocessors have a program.
    """
    out_features, in_features = weight.shape
    inner = 128
    while weight.num_groups > 1 and weight.group_size % inner != 0:
        inner //= 2
    if inner < 16 or x.element_size() != 2:
        return None
    splits, steps = 1, cdiv(in_features, inner)
    while splits < 8 and cdiv(out_features, 64) * splits < MIN_PROGRAM_SHARE * multiprocessor_count(x.device):
        splits *= 2
    return Blocks(64, inner, min(splits, steps))


def quantized_splits(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    x = weight.order_input(x)
    blocks = choose_blocks(weight, x)
    if blocks is None:
        return functional.linear(x, dequantize(weight, x.dtype), bias).unsqueeze(0)
    tokens, (out_features, in_features) = x.shape[0], weight.shape
    split_features = cdiv(cdiv(in_features, blocks.inner), blocks.splits) * blocks.inner
    splits = cdiv(in_features, split_features)
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty((splits, tokens, out_features), dtype=dtype, device=x.device)
    if tokens == 0:
        return out
    values, zeros, flags = tile_arguments(weight)
    block_tokens = min(MAX_TILE_TOKENS, max(16, next_power_of_2(tokens)))
    assert x.stride(1) == 1
    assert values.is_contiguous()
    assert weight.scales.is_contiguous()
    assert zeros.is_contiguous()
    quantized_splits_kernel[(cdiv(out_features, blocks.out), splits, cdiv(tokens, block_tokens))](
        x,
        values,
        weight.scales,
        zeros,
        x if bias is None else bias,
        out,
        tokens,
        out_features,
        in_features,
        split_features,
        weight.group_size,
        x.stride(0),
        **flags,
        is_grouped=weight.num_groups > 1,
        has_bias=bias is not None,
        block_tokens=block_tokens,
        block_out=blocks.out,
        block_inner=blocks.inner,
        num_warps=4,
        num_stages=3,
        **dependent_launch(x.device),
    )
    return out
