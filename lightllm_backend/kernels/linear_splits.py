# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products of a few tokens with a weight, which take as long as it takes to be read. More tokens go to cuBLAS.

Where the output features are too few to occupy the GPU, the inner dimension is split, and the parts are left to whoever
reads them next to be added up: a norm does that on its way.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import compute_capability, multiprocessor_count

# cuBLAS is as quick from there on (measured on an H200, LLaMA-7B's weights).
MAX_TOKENS = 64
# A weight's rows and columns in a program's tile.
BLOCK_OUT, BLOCK_INNER = 64, 128


class LinearBlocks(NamedTuple):
    num_stages: int
    splits: int


def choose_blocks(
    out_features: int, in_features: int, capability: tuple[int, int], multiprocessors: int
) -> LinearBlocks | None:
    """How the product is cut, None where cuBLAS is left to it: the inner dimension is split until nearly every
    multiprocessor has a program, and the fewer it has, the more reads each keeps in flight."""
    if capability < (8, 0) or out_features % BLOCK_OUT or in_features % BLOCK_INNER:
        return None
    programs = out_features // BLOCK_OUT
    splits = 1
    while programs * splits < 0.9 * multiprocessors and splits < 8 and in_features % (2 * splits * BLOCK_INNER) == 0:
        splits *= 2
    if capability[0] != 9:
        num_stages = 4
    else:
        share = programs * splits / multiprocessors
        num_stages = 5 if share <= 1.1 else 3 if share <= 2 else 4
    return LinearBlocks(num_stages, splits)


def blocks_for(x: Tensor, weight: Tensor) -> LinearBlocks | None:
    """None where the product is left to cuBLAS."""
    tokens, in_features = x.shape
    if not 0 < tokens <= MAX_TOKENS or x.dtype == torch.float32:
        return None
    device = x.device
    return choose_blocks(weight.shape[0], in_features, compute_capability(device), multiprocessor_count(device))


@triton.jit(do_not_specialize=["tokens"])
def linear_splits_kernel(
    x,
    weight,
    bias,
    out,
    tokens,
    out_features,
    in_features,
    split_features,
    x_stride,
    has_bias: tl.constexpr,
    is_dependent: tl.constexpr,
    block_tokens: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """A block of output features of all tokens, over one split of the inner dimension. The weight is the left operand:
    its rows fill a tensor core's 64, which the few tokens could not."""
    block = tl.program_id(0).to(tl.int64) * block_out
    split = tl.program_id(1)
    row = tl.arange(0, block_out)
    token = tl.arange(0, block_tokens)
    inner = tl.arange(0, block_inner)
    live = (token < tokens)[None, :]
    weight += block * in_features + split * split_features
    wait_for_previous(is_dependent)
    weight_block = weight + row[:, None] * in_features + inner[None, :]
    x_block = x + token[None, :] * x_stride + (split * split_features + inner)[:, None]
    total = tl.zeros([block_out, block_tokens], dtype=tl.float32)
    for first in range(0, split_features, block_inner):
        total = tl.dot(tl.load(weight_block + first), tl.load(x_block + first, mask=live, other=0.0), total)
    feature = block + row
    if has_bias:
        added = tl.load(bias + feature).to(tl.float32)
        total += tl.where(split == 0, added, 0.0)[:, None]
    address = out + (split * tokens + token[None, :]) * out_features + feature[:, None]
    tl.store(address, total.to(out.dtype.element_ty), mask=live)


def linear_splits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    blocks = blocks_for(x, weight)
    if blocks is None:
        return functional.linear(x, weight, bias).unsqueeze(0)
    dtype = x.dtype if blocks.splits == 1 else torch.float32
    out = torch.empty((blocks.splits, x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    launch(x, weight, bias, out, blocks)
    return out


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, blocks: LinearBlocks) -> None:
    """Write the parts to `out` [splits, tokens, out_features]."""
    tokens, in_features = x.shape
    out_features = weight.shape[0]
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert out.is_contiguous()
    linear_splits_kernel[(out_features // BLOCK_OUT, blocks.splits)](
        x,
        weight,
        x if bias is None else bias,
        out,
        tokens,
        out_features,
        in_features,
        in_features // blocks.splits,
        x.stride(0),
        has_bias=bias is not None,
        block_tokens=max(16, triton.next_power_of_2(tokens)),
        block_out=BLOCK_OUT,
        block_inner=BLOCK_INNER,
        num_warps=4,
        num_stages=blocks.num_stages,
        **dependent_launch(x.device),
    )
