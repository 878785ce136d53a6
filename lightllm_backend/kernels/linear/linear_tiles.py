# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products of more tokens than linear_splits and gated_linear have kernels for, which launch this one then.

To read the weight and to multiply by it take about as long here. Both operands come by descriptors, as Hopper can: so
copies take no threads' time, and a tile of tokens by features is large enough for tensor cores at their full rate.
"""

import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import TensorDescriptor
from lightllm_backend.kernels.linear.linear_blocks import LinearBlocks

BLOCK_TOKENS = 128


@triton.jit(do_not_specialize=["tokens", "steps"])
def linear_tiles_kernel(
    x_tiles,
    weight_tiles,
    bias,
    out,
    tokens,
    features,
    steps,
    has_bias: tl.constexpr,
    is_gated: tl.constexpr,
    is_dependent: tl.constexpr,
    block_tokens: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """A tile of tokens by rows of the weight, over one split of the inner dimension. If gated, half of the rows are of
    the gate's weight, half of the other's."""
    half: tl.constexpr = block_out // 2 if is_gated else block_out
    token = tl.program_id(0) * block_tokens
    feature = tl.program_id(1) * half
    split = tl.program_id(2)
    first = split * steps // tl.num_programs(2)
    last = (split + 1) * steps // tl.num_programs(2)
    # There is no way around the loop, on which the products would be no results of tensor cores; for the sake of that
    # way ptxas would wait for each product.
    tl.assume(first < last)
    wait_for_previous(is_dependent)
    total = tl.zeros([block_tokens, block_out], dtype=tl.float32)
    for step in range(first, last):
        inner = step * block_inner
        weight_block = weight_tiles.load([0, feature, inner]).reshape(block_out, block_inner)
        total = tl.dot(x_tiles.load([token, inner]), weight_block.T, total)
    if has_bias:
        row = tl.arange(0, block_out)
        column = feature + row % half
        added = tl.load(bias + column + row // half * features, mask=column < features, other=0.0).to(tl.float32)
        total += tl.where(split == 0, added, 0.0)[None, :]
    if is_gated:
        gate, up = tl.split(total.reshape(block_tokens, 2, half).permute(0, 2, 1))
        total = gate * tl.sigmoid(gate) * up
    token += tl.arange(0, block_tokens)
    feature += tl.arange(0, half)
    address = out + (split.to(tl.int64) * tokens + token[:, None]) * features + feature[None, :]
    live = (token < tokens)[:, None] & (feature < features)[None, :]
    tl.store(address, total.to(out.dtype.element_ty), mask=live)


def launch_tiles(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, blocks: LinearBlocks, is_gated: bool
) -> None:
    """Write the parts to `out` [splits, tokens, features]; if gated, the one that there is."""
    tokens, in_features = x.shape
    features, matrices = out.shape[-1], 2 if is_gated else 1
    assert weight.shape == (matrices * features, in_features)
    assert weight.is_contiguous()
    assert out.shape == (blocks.splits, tokens, features)
    assert out.is_contiguous()
    assert blocks.splits == 1 or not is_gated
    linear_tiles_kernel[
        (triton.cdiv(tokens, BLOCK_TOKENS), triton.cdiv(matrices * features, blocks.out), blocks.splits)
    ](
        TensorDescriptor(x, [tokens, in_features], [x.stride(0), 1], [BLOCK_TOKENS, blocks.inner]),
        TensorDescriptor(
            weight,
            [matrices, features, in_features],
            [features * in_features, in_features, 1],
            [matrices, blocks.out // matrices, blocks.inner],
        ),
        x if bias is None else bias,
        out,
        tokens,
        features,
        triton.cdiv(in_features, blocks.inner),
        has_bias=bias is not None,
        is_gated=is_gated,
        block_tokens=BLOCK_TOKENS,
        block_out=blocks.out,
        block_inner=blocks.inner,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **dependent_launch(x.device),
    )
