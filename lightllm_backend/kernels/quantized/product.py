# SPDX-License-Identifier: Apache-2.0
"""The product with a weight of 4 or 8 bits: which kernel computes it for how many tokens."""

import torch
from torch import Tensor

from lightllm_backend.kernels.hardware import compute_capability
from lightllm_backend.kernels.quantized.choice import (
    MAX_16_BIT_TOKENS,
    PrefetchBlocks,
    has_16_bit_parts,
    is_direct,
    prefetch_blocks,
)
from lightllm_backend.kernels.quantized.dequantize import dequantize
from lightllm_backend.kernels.quantized.quantize_tokens import quantize_tokens
from lightllm_backend.kernels.quantized.quantized_splits import MAX_TILE_TOKENS, quantized_splits
from lightllm_backend.kernels.quantized.rounded_tokens import Activations, PairedTokens, RoundedTokens
from lightllm_backend.kernels.quantized.scaled_linear import scaled_linear
from lightllm_backend.kernels.quantized.weight import QuantizedWeight


def quantized_parts(x: Activations, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The product with `x` [tokens, in_features] as parts [splits, tokens, out_features], by the first that applies:

    1 to 256 tokens  quantized_prefetch, if the weight is in fragments (Hopper) and choice.py has blocks for it; what a
                     norm has rounded is multiplied as it is; above 64 tokens, other activations are rounded if the
                     checkpoint wants it: by quantize_tokens if it is fp8 by channel, by the kernels below if not
    1 to 64 tokens   quantized_splits: reading the weight bounds the time, whatever the activations' bits
    more tokens, and activations that were rounded already
                     quantize_tokens and scaled_linear, or cuBLAS for fp8 by channel on Hopper, if the checkpoint wants
                     activations of 8 bits and the GPU has tensor cores for them: int8 from Ampere on, fp8 from Ada on
                     dequantize and cuBLAS
    """
    blocks = prefetch_blocks(x, weight, is_gated=False)
    if blocks is not None:
        has_16_bits = blocks.splits == 1 or has_16_bit_parts(x.dtype)
        dtype = x.dtype if has_16_bits else torch.float32
        out = torch.empty((blocks.splits, x.shape[0], weight.shape[0]), dtype=dtype, device=weight.values.device)
        return _prefetch(x, weight, bias, out, blocks, is_gated=False)
    if isinstance(x, Tensor):
        if x.shape[0] <= MAX_TILE_TOKENS:
            return quantized_splits(x, weight, bias)
        x = weight.order_input(x)
        if multiplies_8_bits(weight, x.device):
            x = RoundedTokens(*quantize_tokens(x, weight), x.dtype)
    if isinstance(x, RoundedTokens):
        if _suits_cublas(x, weight):
            return _scaled_by_cublas(x, weight, bias).unsqueeze(0)
        return scaled_linear(x.values, x.scales, weight, bias, x.dtype).unsqueeze(0)
    assert isinstance(x, Tensor), "pairs are for quantized_prefetch"
    whole = dequantize(weight, x.dtype).t()
    return (torch.mm(x, whole) if bias is None else torch.addmm(bias, x, whole)).unsqueeze(0)


def quantized_gated(x: Activations, weight: QuantizedWeight, bias: Tensor | None, is_gelu: bool) -> Tensor | None:
    """gated_linear by quantized_prefetch, for a weight [2 * features, in_features]; None: it does not apply."""
    blocks = prefetch_blocks(x, weight, is_gated=True)
    if blocks is None:
        return None
    out = torch.empty((1, x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=weight.values.device)
    return _prefetch(x, weight, bias, out, blocks, is_gated=True, is_gelu=is_gelu).squeeze(0)


def quantized_gelu(x: Activations, weight: QuantizedWeight, bias: Tensor | None) -> Tensor | None:
    """gelu_tanh of the product, by quantized_prefetch; None: it does not compute the product as a whole."""
    blocks = prefetch_blocks(x, weight, is_gated=False)
    if blocks is None or blocks.splits > 1:
        return None
    out = torch.empty((1, x.shape[0], weight.shape[0]), dtype=x.dtype, device=weight.values.device)
    return _prefetch(x, weight, bias, out, blocks, is_gated=False, is_gelu=True).squeeze(0)


def multiplies_8_bits(weight: QuantizedWeight, device: torch.device) -> bool:
    """Whether activations enter the products of many tokens in 8 bits: the checkpoint wants it, and the GPU can."""
    needed = (8, 0) if weight.values.dtype == torch.int8 else (8, 9)
    return weight.quantizes_input and compute_capability(device) >= needed


def _prefetch(
    x: Activations,
    weight: QuantizedWeight,
    bias: Tensor | None,
    out: Tensor,
    blocks: PrefetchBlocks,
    is_gated: bool,
    is_gelu: bool = False,
) -> Tensor:
    # Not every Triton-lang has Gluon.
    from lightllm_backend.kernels.quantized.quantized_prefetch import launch_quantized_prefetch

    values, scales = (weight.order_input(x), None) if isinstance(x, Tensor) else (x.values, x.scales)
    if scales is None and len(values) > MAX_16_BIT_TOKENS and is_direct(weight):
        values, scales = quantize_tokens(values, weight)
    launch_quantized_prefetch(values, scales, weight, bias, out, blocks, is_gated, is_gelu, isinstance(x, PairedTokens))
    return out


def _suits_cublas(x: RoundedTokens, weight: QuantizedWeight) -> bool:
    is_aligned = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    is_hopper = compute_capability(weight.values.device) == (9, 0)
    return is_hopper and is_aligned and x.dtype == torch.bfloat16 and is_direct(weight)


def _scaled_by_cublas(x: RoundedTokens, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    values, scales = x.whole_tiles()
    # Its public name is not in torch 2.6. Fast accumulation loses less than rounding the activations did.
    out = torch._scaled_mm(  # noqa: SLF001
        values, weight.values.t(), scales, weight.scales, bias, out_dtype=x.dtype, use_fast_accum=True
    )
    return out[: len(x)]
