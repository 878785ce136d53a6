# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Writes a weight of 4 or 8 bits out in 16 bits, for products with enough tokens to hide the cost."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.quantized.load_tile import FP8_UNIT, load_tile, tile_arguments
from lightllm_backend.kernels.quantized.weight import QuantizedWeight

_OUT, _INNER = 16, 256


@triton.jit
def dequantize_kernel(
    values,
    scales,
    zeros,
    out,
    out_features,
    in_features,
    group_size,
    is_int4: tl.constexpr,
    is_fp8: tl.constexpr,
    has_zeros: tl.constexpr,
    in_fragments: tl.constexpr,
    is_dependent: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """Writes a tile of the weight. Each column looks its group up, which may end within the tile."""
    row = tl.program_id(0).to(tl.int64) * block_out + tl.arange(0, block_out)
    first = tl.program_id(1) * block_inner
    column = first + tl.arange(0, block_inner)
    live = (row < out_features)[:, None] & (column < in_features)[None, :]
    of_group = (column // group_size)[None, :] * out_features + row[:, None]
    wait_for_previous(is_dependent)
    # A zero point of the tile's first group would be wrong for others: they are subtracted here.
    number = load_tile(
        values, zeros, row, first, 0, out_features, in_features, tl.float32,
        is_int4, is_fp8, False, in_fragments, block_inner,
    )  # fmt: skip
    if has_zeros:
        zero = tl.load(zeros + of_group, mask=live, other=0).to(tl.float32)
        number -= zero - (8.0 if is_int4 else 0.0)
    scale = tl.load(scales + of_group, mask=live, other=0.0).to(tl.float32)
    if is_fp8:
        number *= FP8_UNIT
    tl.store(out + row[:, None] * in_features + column[None, :], (number * scale).to(out.dtype.element_ty), mask=live)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    out_features, in_features = weight.shape
    out = torch.empty(weight.shape, dtype=dtype, device=weight.values.device)
    values, zeros, flags = tile_arguments(weight)
    assert values.is_contiguous()
    assert weight.scales.is_contiguous()
    assert zeros.is_contiguous()
    dequantize_kernel[(triton.cdiv(out_features, _OUT), triton.cdiv(in_features, _INNER))](
        values,
        weight.scales,
        zeros,
        out,
        out_features,
        in_features,
        weight.group_size,
        **flags,
        block_out=_OUT,
        block_inner=_INNER,
        num_warps=4,
        **dependent_launch(out.device),
    )
    return out
