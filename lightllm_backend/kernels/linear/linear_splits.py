# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Products of up to 64 tokens with a weight, bounded by the time to read the weight.

Where the output features alone are too few to occupy the GPU, the inner dimension is split too. The next kernel adds
the parts as it reads them: a norm does so at no extra cost. choice.py picks the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.linear.choice import Choice, ProductKernel, choice_for
from lightllm_backend.kernels.linear.linear_tiles import launch_tiles
from lightllm_backend.kernels.quantized.product import quantized_parts
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import QuantizedWeight, Weight
from lightllm_backend.kernels.sizes import next_power_of_2


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
    """Computes a block of output features for all tokens, over one split of the inner dimension. The weight is the left
    operand: its rows fill the 64 of a tensor core, which so few tokens could not."""
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


def linear_splits(x: Activations, weight: Weight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        return quantized_parts(x, weight, bias)
    assert isinstance(weight, Tensor)
    assert isinstance(x, Tensor)
    choice = choice_for(x, weight, bias)
    if choice.blocks is None:
        return functional.linear(x, weight, bias).unsqueeze(0)
    splits = choice.blocks.splits
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty((splits, x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    launch_product(x, weight, bias, out, choice)
    return out


def launch_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, choice: Choice) -> None:
    """Write the parts to `out` [splits, tokens, out_features]: float32, or of x's type if there is one split."""
    blocks = choice.blocks
    assert blocks is not None
    tokens, in_features = x.shape
    out_features = weight.shape[0]
    if choice.kernel is ProductKernel.PREFETCH:
        from lightllm_backend.kernels.linear.linear_prefetch import launch_prefetch  # not every Triton-lang has Gluon

        launch_prefetch(x, weight, bias, out, blocks, is_gated=False)
        return
    if choice.kernel is ProductKernel.TILES:
        launch_tiles(x, weight, bias, out, blocks, is_gated=False)
        return
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
        block_tokens=max(16, next_power_of_2(tokens)),
        block_out=blocks.out,
        block_inner=blocks.inner,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        **dependent_launch(x.device),
    )
