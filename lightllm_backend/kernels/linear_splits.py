# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products of a few tokens with a weight, which take as long as it takes to be read. More tokens go to cuBLAS.

Where the output features are too few to occupy the GPU, the inner dimension is split, and the parts are left to whoever
reads them next to be added up: a norm does that on its way. How the products of known models are cut best is stored in
linear_blocks.json, by GPU; others go by a rule.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import compute_capability, multiprocessor_count

# Beyond, cuBLAS is as quick. Tokens are padded to one of these numbers.
TOKEN_BLOCKS = (16, 32, 64)

STORED = Path(__file__).with_name("linear_blocks.json")


class LinearBlocks(NamedTuple):
    """A program's tile of the weight, rows and columns, and how the work is spread."""

    out: int
    inner: int
    num_stages: int
    num_warps: int
    splits: int


@lru_cache
def stored_blocks() -> dict[str, dict[str, dict[str, list[int] | None]]]:
    """By compute capability and product, see `product_name`, and block of tokens; null: cuBLAS is quicker.

    Written by perf/tune_linear.py.
    """
    stored: dict[str, dict[str, dict[str, list[int] | None]]] = json.loads(STORED.read_text())["blocks"]
    return stored


def product_name(out_features: int, in_features: int, is_gated: bool) -> str:
    return f"{out_features} x {in_features}{', gated' if is_gated else ''}"


def choose_blocks(
    tokens: int, out_features: int, in_features: int, is_gated: bool, capability: tuple[int, int], multiprocessors: int
) -> LinearBlocks | None:
    """As stored, or by a rule: the inner dimension is split until most multiprocessors have a program, and the fewer
    each has, the more reads it keeps in flight. None where the product is left to cuBLAS."""
    block_tokens = next((block for block in TOKEN_BLOCKS if tokens <= block), None)
    if tokens == 0 or block_tokens is None or capability < (8, 0):
        return None
    known = stored_blocks().get("{}.{}".format(*capability), {})
    if found := known.get(product_name(out_features, in_features, is_gated)):
        stored = found[str(block_tokens)]
        return None if stored is None else LinearBlocks(*stored)
    out, inner, splits = 64, 128, 1
    if out_features % out or in_features % inner:
        return None
    programs = out_features // out
    while programs * splits < 0.55 * multiprocessors and splits < 8 and in_features % (2 * splits * inner) == 0:
        splits *= 2
    if is_gated and splits > 1:
        return None
    share = programs * splits / multiprocessors
    num_stages = (5 if share <= 1.1 else 3 if share <= 1.6 else 4) if capability == (9, 0) else 4
    return LinearBlocks(out, inner, num_stages, 4, splits)


def blocks_for(x: Tensor, weight: Tensor, is_gated: bool = False) -> LinearBlocks | None:
    if x.dtype == torch.float32:
        return None
    out_features, in_features = weight.shape
    capability, multiprocessors = compute_capability(x.device), multiprocessor_count(x.device)
    return choose_blocks(x.shape[0], out_features, in_features, is_gated, capability, multiprocessors)


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
    linear_splits_kernel[(out_features // blocks.out, blocks.splits)](
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
        block_out=blocks.out,
        block_inner=blocks.inner,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **dependent_launch(x.device),
    )
