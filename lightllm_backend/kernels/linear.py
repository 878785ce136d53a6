# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products of a few tokens with a weight, which take as long as it takes to be read. More tokens go to cuBLAS."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.hardware import compute_capability, multiprocessor_count
from lightllm_backend.kernels.sum_splits import sum_splits

MAX_TOKENS = 32  # cuBLAS reads the weight as quickly from 64 tokens on (measured on an H200)
BLOCK_OUT = 64


class LinearBlocks(NamedTuple):
    inner: int
    num_stages: int
    splits: int


def choose_blocks(
    out_features: int, in_features: int, capability: tuple[int, int], multiprocessors: int
) -> LinearBlocks | None:
    """How the product is cut, None where cuBLAS is left to it: a large tile, enough stages to keep reads in flight, and
    the inner dimension split until nearly every multiprocessor has a program."""
    inner = 128
    if capability < (8, 0) or out_features % BLOCK_OUT or in_features % inner:
        return None
    programs = out_features // BLOCK_OUT
    splits = 1
    while programs * splits < 0.9 * multiprocessors and splits < 8 and in_features % (2 * splits * inner) == 0:
        splits *= 2
    return LinearBlocks(inner, 6 if capability[0] == 9 and in_features >= 8192 else 4, splits)


@triton.jit
def linear_kernel(
    x,
    weight,
    bias,
    out,
    tokens,
    out_features,
    x_stride,
    in_features: tl.constexpr,
    splits: tl.constexpr,
    has_bias: tl.constexpr,
    block_tokens: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """A block of output features of all tokens, over one split of the inner dimension. The weight is the left operand:
    its rows fill a tensor core's 64, which the few tokens could not."""
    feature = tl.program_id(0) * block_out + tl.arange(0, block_out)
    split = tl.program_id(1)
    token = tl.arange(0, block_tokens)
    inner = tl.arange(0, block_inner)
    live = (token < tokens)[None, :]
    split_features: tl.constexpr = in_features // splits
    weight_block = weight + feature[:, None].to(tl.int64) * in_features + (split * split_features + inner)[None, :]
    x_block = x + token[None, :] * x_stride + (split * split_features + inner)[:, None]
    total = tl.zeros([block_out, block_tokens], dtype=tl.float32)
    for first in range(0, split_features, block_inner):
        total = tl.dot(tl.load(weight_block + first), tl.load(x_block + first, mask=live, other=0.0), total)
    if has_bias:
        total += tl.load(bias + feature).to(tl.float32)[:, None]
    address = out + (split * tokens + token[None, :]) * out_features + feature[:, None]
    tl.store(address, total.to(out.dtype.element_ty), mask=live)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tokens, in_features = x.shape
    out_features = weight.shape[0]
    blocks = None
    if 0 < tokens <= MAX_TOKENS and x.dtype != torch.float32:
        blocks = choose_blocks(out_features, in_features, compute_capability(x.device), multiprocessor_count(x.device))
    if blocks is None:
        return functional.linear(x, weight, bias)
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    # Splits are added up, with the bias, by a kernel of their own.
    is_split = blocks.splits > 1
    shape = (blocks.splits, tokens, out_features) if is_split else (tokens, out_features)
    out = torch.empty(shape, dtype=torch.float32 if is_split else x.dtype, device=x.device)
    linear_kernel[(out_features // BLOCK_OUT, blocks.splits)](
        x,
        weight,
        x if bias is None else bias,
        out,
        tokens,
        out_features,
        x.stride(0),
        in_features=in_features,
        splits=blocks.splits,
        has_bias=bias is not None and not is_split,
        block_tokens=max(16, triton.next_power_of_2(tokens)),
        block_out=BLOCK_OUT,
        block_inner=blocks.inner,
        num_warps=4,
        num_stages=blocks.num_stages,
    )
    return sum_splits(out, bias, x.dtype) if is_split else out
