# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Writes a weight of 4 or 8 bits out in 16 bits, for products with enough tokens to hide the cost."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllm_backend.kernels.dependent_launch import dependent_launch, wait_for_previous
from lightllm_backend.kernels.quantized.fragments import CHUNK
from lightllm_backend.kernels.quantized.load_tile import FP8_UNIT, load_tile, tile_arguments
from lightllm_backend.kernels.quantized.weight import INT4_ZERO, QuantizedWeight
from lightllm_backend.kernels.sizes import cdiv

_OUT, _INNER = 16, 256
_CHUNK, _ZERO = tl.constexpr(CHUNK), tl.constexpr(INT4_ZERO)
# A float32 with these bits around a whole number's is 2**23 larger than that.
_BITS_OF_2_23, _2_23 = tl.constexpr(0x4B000000), tl.constexpr(2.0**23)
# fp8's exponent and fraction, in the places of a float32's, are a number so many times smaller: its bias is another.
_FP8_AS_FLOAT32 = tl.constexpr(2.0**120)


@triton.jit
def _weights_of(digits, zero, scale, is_int4: tl.constexpr, is_fp8: tl.constexpr):
    """The weights in the lowest bits of `digits` [rows, chunks, half a chunk], float32."""
    if is_fp8:
        bits = ((digits & 0x80) << 24) | ((digits & 0x7F) << 20)
        number = bits.to(tl.float32, bitcast=True) * _FP8_AS_FLOAT32
    elif is_int4:
        number = ((digits & 15) | _BITS_OF_2_23).to(tl.float32, bitcast=True) - (zero + _2_23)[:, :, None]
    else:  # with the sign inverted, eight bits are the number plus 128
        bits = ((digits & 255) ^ 128) | _BITS_OF_2_23
        number = bits.to(tl.float32, bitcast=True) - (zero + (_2_23 + 128.0))[:, :, None]
    return number * scale[:, :, None]


@triton.jit
def dequantize_fragments_kernel(
    words,
    scales,
    zeros,
    out,
    out_features,
    in_features,
    group_size,
    is_int4: tl.constexpr,
    is_fp8: tl.constexpr,
    has_zeros: tl.constexpr,
    is_dependent: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """Writes a tile of a weight in fragments, from words of 32 bits. Chunks lie within groups."""
    chunks: tl.constexpr = block_inner // _CHUNK
    bits: tl.constexpr = 4 if is_int4 else 8
    words_of_chunk: tl.constexpr = _CHUNK * bits // 32
    row = tl.program_id(0).to(tl.int64) * block_out + tl.arange(0, block_out)
    chunk = tl.program_id(1) * chunks + tl.arange(0, chunks)
    word = tl.program_id(1) * chunks * words_of_chunk + tl.arange(0, chunks * words_of_chunk)
    column = tl.program_id(1) * block_inner + tl.arange(0, block_inner)
    row_words = in_features // _CHUNK * words_of_chunk
    is_row = (row < out_features)[:, None]
    address = words + row[:, None] * row_words + word[None, :]
    loaded = tl.load(address, mask=is_row & (word < row_words)[None, :], other=0)
    of_group = (chunk * _CHUNK // group_size)[None, :] * out_features + row[:, None]
    live = is_row & (chunk * _CHUNK < in_features)[None, :]
    scale = tl.load(scales + of_group, mask=live, other=0.0).to(tl.float32)
    if has_zeros:
        zero = tl.load(zeros + of_group, mask=live, other=0).to(tl.float32)
    else:
        zero = tl.full((block_out, chunks), _ZERO if is_int4 else 0, tl.float32)
    # A word's pairs; the second of a pair is 16 bits further. The axes have their names in fragments.py.
    first = tl.reshape(loaded[:, :, None] >> (bits * tl.arange(0, 16 // bits)), (block_out, chunks, _CHUNK // 2))
    of_first = _weights_of(first, zero, scale, is_int4, is_fp8).to(out.dtype.element_ty)
    of_second = _weights_of(first >> 16, zero, scale, is_int4, is_fp8).to(out.dtype.element_ty)
    digits = tl.reshape(tl.join(of_first, of_second), (block_out, chunks, 4, 4, 2, 2))  # thread, block, half, second
    tile = tl.reshape(tl.permute(digits, (0, 1, 3, 4, 2, 5)), (block_out, block_inner))
    wait_for_previous(is_dependent)
    tl.store(out + row[:, None] * in_features + column[None, :], tile, mask=is_row & (column < in_features)[None, :])


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
    is_dependent: tl.constexpr,
    block_out: tl.constexpr,
    block_inner: tl.constexpr,
):
    """Writes a tile of a weight in order. Each column looks its group up, which may end within the tile."""
    row = tl.program_id(0).to(tl.int64) * block_out + tl.arange(0, block_out)
    first = tl.program_id(1) * block_inner
    column = first + tl.arange(0, block_inner)
    live = (row < out_features)[:, None] & (column < in_features)[None, :]
    of_group = (column // group_size)[None, :] * out_features + row[:, None]
    wait_for_previous(is_dependent)
    # A zero point of the tile's first group would be wrong for others: they are subtracted here.
    number = load_tile(
        values, zeros, row, first, 0, out_features, in_features, tl.float32,
        is_int4, is_fp8, False, False, block_inner,
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
    kernel = dequantize_kernel
    if flags.pop("in_fragments"):
        kernel, values = dequantize_fragments_kernel, values.view(torch.int32)
    kernel[(cdiv(out_features, _OUT), cdiv(in_features, _INNER))](
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
