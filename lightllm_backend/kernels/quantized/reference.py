# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the products with weights of 4 and 8 bits; kernels/interface.py says what each function computes."""

import torch
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.quantized.fragments import CHUNK, fragment_columns, pair_columns
from lightllm_backend.kernels.quantized.rounded_tokens import PAIR_FACTORS, PAIR_LIMITS, PairedTokens
from lightllm_backend.kernels.quantized.weight import INT4_ZERO, LIMITS, MIN_INPUT_SCALE, QuantizedWeight, unpack_int4


def arrange_weight(weight: QuantizedWeight) -> QuantizedWeight:
    return weight


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    values = (unpack_int4(weight.values) if weight.is_int4 else weight.values).float()
    if weight.in_fragments:
        values = values[:, _places(weight).argsort()]
    if weight.zeros is not None:
        values -= _by_column(weight.zeros, weight)
    elif weight.is_int4:
        values -= INT4_ZERO
    return (values * _by_column(weight.scales, weight)).to(dtype)


def _places(weight: QuantizedWeight, columns: Tensor | None = None) -> Tensor:
    """The column that is at each place of a weight in fragments, or of what has other `columns` of each chunk."""
    columns = fragment_columns(weight.is_int4) if columns is None else columns
    return (torch.arange(0, weight.shape[1], CHUNK)[:, None] + columns).flatten()


def _by_column(of_groups: Tensor, weight: QuantizedWeight) -> Tensor:
    """Numbers of groups [groups, out_features] for each column, as float32 [out_features, in_features or 1]."""
    columns = of_groups.float().t()
    return columns if len(of_groups) == 1 else _expanded(columns, weight)


def _expanded(of_groups: Tensor, weight: QuantizedWeight) -> Tensor:
    """Numbers of groups [n, groups], repeated for the columns of each: [n, in_features]."""
    return of_groups.repeat_interleave(weight.group_size, 1)[:, : weight.shape[1]]


def quantize_tokens(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    dtype, (tokens, in_features) = weight.values.dtype, x.shape
    limit, x = LIMITS[dtype], x.float()
    if weight.input_scale is not None:
        scales = weight.input_scale.expand(tokens, weight.num_groups).contiguous()
    else:
        padded = functional.pad(x, (0, -in_features % weight.group_size))
        largest = padded.view(tokens, weight.num_groups, weight.group_size).abs().amax(-1)
        scales = (largest / limit).clamp_min(MIN_INPUT_SCALE)
    # A scale of the checkpoint may be so small that numbers reach -128.
    values = (x / _expanded(scales, weight)).clamp(-128 if dtype == torch.int8 else -limit, limit)
    if weight.in_fragments:
        values = values[:, _places(weight)]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def pair_tokens(x: Tensor, weight: QuantizedWeight) -> PairedTokens:
    """Activations [tokens, in_features] as PairedTokens for the weight, which is in fragments."""
    dtype = torch.int8 if weight.is_int4 else torch.float8_e4m3fn
    factor, numbers = PAIR_FACTORS[dtype], x.float()
    least = (numbers.abs().amax(-1) / PAIR_LIMITS[dtype]).clamp_min(MIN_INPUT_SCALE)
    scales = least.log2().ceil().exp2()
    numbers = numbers / scales[:, None]
    if dtype == torch.int8:
        numbers = numbers.round()
        first = ((numbers + factor / 2) / factor).floor()
        second = numbers - factor * first
    else:
        first = numbers.to(dtype).float()
        second, scales = factor * (numbers - first), scales / factor
    pairs = torch.stack((first, second), 1)[:, :, _places(weight, pair_columns(weight.is_int4))]
    return PairedTokens(pairs.flatten(0, 1).to(dtype), scales, x.dtype)


def paired_linear(x: PairedTokens, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    first, second = x.values.float().view(len(x), 2, -1).unbind(1)
    whole = (PAIR_FACTORS[x.values.dtype] * first + second) * x.scales[:, None]
    whole = whole[:, _places(weight, pair_columns(weight.is_int4)).argsort()]
    product = functional.linear(whole, dequantize(weight, torch.float32))
    return (product if bias is None else product + bias.float()).to(x.dtype)


def quantized_splits(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    return functional.linear(weight.order_input(x), dequantize(weight, x.dtype), bias).unsqueeze(0)


def scaled_linear(
    x: Tensor, x_scales: Tensor, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if weight.in_fragments:
        x = x.view(torch.uint8)[:, _places(weight).argsort()].view(x.dtype)
    product = functional.linear(x.float() * _expanded(x_scales, weight), dequantize(weight, torch.float32))
    return (product if bias is None else product + bias.float()).to(dtype)


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The product with `x` [tokens, in_features], whose activations have as many bits as the checkpoint asks for."""
    if weight.quantizes_input:
        return scaled_linear(*quantize_tokens(weight.order_input(x), weight), weight, bias, x.dtype)
    return quantized_splits(x, weight, bias).squeeze(0)
