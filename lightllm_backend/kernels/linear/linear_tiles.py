# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products of 65 to 256 tokens on Hopper, where reading the weight and multiplying by it take about as long.

TMA descriptors copy both operands, so copies take no threads' time, and a tile of tokens by features is large enough to
run tensor cores at their full rate. linear_splits and gated_linear launch this kernel.
"""

import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.activation.gate import activated
from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.hardware import TensorDescriptor, has_ptx
from lightllm_backend.kernels.linear.choice import LinearBlocks
from lightllm_backend.kernels.sizes import cdiv

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
    is_gelu: tl.constexpr,
    is_ptx: tl.constexpr,
    is_dependent: tl.constexpr,
    block_tokens: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """Computes a tile of tokens by rows of the weight, over one split of the inner dimension. If gated, half of the
    rows belong to the gate, half to `up`."""
    half: tl.constexpr = block_out // 2 if is_gated else block_out
    token = tl.program_id(0) * block_tokens
    feature = tl.program_id(1) * half
    split = tl.program_id(2)
    first = split * steps // tl.num_programs(2)
    last = (split + 1) * steps // tl.num_programs(2)
    # The loop runs at least once. If it could be skipped, `total` would have a second source, and ptxas would wait for
    # each product.
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
        total = activated(gate, is_gelu, is_ptx) * up
    token += tl.arange(0, block_tokens)
    feature += tl.arange(0, half)
    address = out + (split.to(tl.int64) * tokens + token[:, None]) * features + feature[None, :]
    live = (token < tokens)[:, None] & (feature < features)[None, :]
    tl.store(address, total.to(out.dtype.element_ty), mask=live)


def launch_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    blocks: LinearBlocks,
    is_gated: bool,
    is_gelu: bool = False,
) -> None:
    """Write the product's parts to `out` [splits, tokens, features]: float32, or of x's type if there is one split.

    `weight` is [features, in_features], if gated [2 * features, in_features], which allows one split only.
    """
    tokens, in_features = x.shape
    features, matrices = out.shape[-1], 2 if is_gated else 1
    assert weight.shape == (matrices * features, in_features)
    assert weight.is_contiguous()
    assert out.shape == (blocks.splits, tokens, features)
    assert out.is_contiguous()
    assert blocks.splits == 1 or not is_gated
    linear_tiles_kernel[(cdiv(tokens, BLOCK_TOKENS), cdiv(matrices * features, blocks.out), blocks.splits)](
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
        cdiv(in_features, blocks.inner),
        has_bias=bias is not None,
        is_gated=is_gated,
        is_gelu=is_gelu,
        is_ptx=has_ptx(x.device),
        block_tokens=BLOCK_TOKENS,
        block_out=blocks.out,
        block_inner=blocks.inner,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **dependent_launch(x.device),
    )
