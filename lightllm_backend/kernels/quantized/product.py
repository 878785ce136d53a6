# SPDX-License-Identifier: Apache-2.0
"""The product with a weight of 4 or 8 bits: which kernel computes it for how many tokens."""

import torch
from torch import Tensor

from lightllm_backend.kernels.hardware import compute_capability
from lightllm_backend.kernels.quantized.dequantize import dequantize
from lightllm_backend.kernels.quantized.quantize_tokens import quantize_tokens
from lightllm_backend.kernels.quantized.quantized_splits import MAX_TILE_TOKENS, quantized_splits
from lightllm_backend.kernels.quantized.scaled_linear import scaled_linear
from lightllm_backend.kernels.quantized.weight import QuantizedWeight


def quantized_parts(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The product with `x` [tokens, in_features] as parts [splits, tokens, out_features], by the first that applies:

    1 to 64 tokens  quantized_splits: reading the weight bounds the time, whatever the activations' bits
    more tokens     quantize_tokens and scaled_linear, if the checkpoint wants activations of 8 bits and the GPU
                    has tensor cores for them: int8 from Ampere on, fp8 from Ada on
                    dequantize and cuBLAS
    """
    if x.shape[0] <= MAX_TILE_TOKENS:
        return quantized_splits(x, weight, bias)
    x = weight.arrange(x)
    if weight.quantizes_input and _has_tensor_cores(weight.values.dtype, x.device):
        return scaled_linear(*quantize_tokens(x, weight), weight, bias, x.dtype).unsqueeze(0)
    whole = dequantize(weight, x.dtype).t()
    return (torch.mm(x, whole) if bias is None else torch.addmm(bias, x, whole)).unsqueeze(0)


def _has_tensor_cores(dtype: torch.dtype, device: torch.device) -> bool:
    return compute_capability(device) >= ((8, 0) if dtype == torch.int8 else (8, 9))
