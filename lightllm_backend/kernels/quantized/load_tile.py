# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Loads tiles of weights of 4 and 8 bits, as numbers that 16 bits hold exactly."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.quantized.weight import QuantizedWeight

# load_tile's numbers for fp8 are the weights divided by this power of two.
FP8_UNIT = tl.constexpr(256.0)


@triton.jit
def _in_order(tile, is_int4: tl.constexpr):
    """Undoes the order of fragments.py, where the axes have their names: chunk, thread, block, ..."""
    rows: tl.constexpr = tile.shape[0]
    chunks: tl.constexpr = tile.shape[1] // 64
    if is_int4:  # the block's two bits lie apart
        digits = tl.reshape(tile, (rows, chunks, 4, 2, 2, 2, 2))
        digits = tl.permute(digits, (0, 1, 3, 5, 6, 2, 4))
    else:
        digits = tl.reshape(tile, (rows, chunks, 4, 4, 2, 2))
        digits = tl.permute(digits, (0, 1, 3, 5, 2, 4))
    return tl.reshape(digits, (rows, chunks * 64))


@triton.jit
def load_tile(
    values,
    zeros,
    row,
    first_column,
    group,
    out_features,
    in_features,
    dtype: tl.constexpr,
    is_int4: tl.constexpr,
    is_fp8: tl.constexpr,
    has_zeros: tl.constexpr,
    in_fragments: tl.constexpr,
    block_inner: tl.constexpr,
):
    """Loads weights of the rows `row` and of `block_inner` columns of one group, without their scales, as `dtype`.

    The result's columns are in order; of a weight in fragments, `block_inner` must be a multiple of 64.

    fp8 arrives as bytes, since only GPUs from compute capability 8.9 on have the type. Its exponent and fraction become
    those of a float16, whose exponent has another bias: 2**8 times smaller, subnormal numbers included.
    """
    live = (row < out_features)[:, None]
    if is_int4:
        word = first_column // 8 + tl.arange(0, block_inner // 8)
        words = tl.load(
            values + row[:, None] * (in_features // 8) + word[None, :],
            mask=live & (word < in_features // 8)[None, :],
            other=0,
        )
        nibbles = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
        tile = tl.reshape(nibbles, (row.shape[0], block_inner))
    else:
        column = first_column + tl.arange(0, block_inner)
        address = values + row[:, None] * in_features + column[None, :]
        tile = tl.load(address, mask=live & (column < in_features)[None, :], other=0).to(tl.int32)
    if in_fragments:
        tile = _in_order(tile, is_int4)
    if is_fp8:
        half = ((tile & 0x80) << 8) | ((tile & 0x7F) << 7)
        number = half.to(tl.int16).to(tl.float16, bitcast=True).to(dtype)
    elif has_zeros:
        zero = tl.load(zeros + group * out_features + row, mask=row < out_features, other=0).to(tl.int32)
        number = (tile - zero[:, None]).to(dtype)
    elif is_int4:
        number = (tile - 8).to(dtype)
    else:
        number = tile.to(dtype)
    return number


def tile_arguments(weight: QuantizedWeight) -> tuple[Tensor, Tensor, dict[str, bool]]:
    """The tensors `values` and `zeros` for load_tile, and its flags."""
    is_fp8 = weight.values.dtype == torch.float8_e4m3fn
    values = weight.values.view(torch.int8) if is_fp8 else weight.values
    flags = {
        "is_int4": weight.is_int4,
        "is_fp8": is_fp8,
        "has_zeros": weight.zeros is not None,
        "in_fragments": weight.in_fragments,
    }
    return values, values if weight.zeros is None else weight.zeros, flags
