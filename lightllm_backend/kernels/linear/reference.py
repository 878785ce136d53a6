# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the products with weights; kernels/interface.py says what each function computes."""

import torch
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.activation.reference import gelu_tanh, silu_and_mul
from lightllm_backend.kernels.quantized.grid_weight import GridWeight
from lightllm_backend.kernels.quantized.reference import paired_linear, quantized_linear, scaled_linear
from lightllm_backend.kernels.quantized.rounded_tokens import Activations, PairedTokens, RoundedTokens
from lightllm_backend.kernels.quantized.weight import QuantizedWeight, Weight


def linear(
    x: Activations, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None, is_gelu: bool = False
) -> Tensor:
    if isinstance(x, RoundedTokens):
        assert isinstance(weight, QuantizedWeight)
        product = scaled_linear(x.values, x.scales, weight, bias, x.dtype)
    elif isinstance(x, PairedTokens):
        assert isinstance(weight, QuantizedWeight)
        product = paired_linear(x, weight, bias)
    elif isinstance(weight, QuantizedWeight):
        product = quantized_linear(x, weight, bias)
    elif isinstance(weight, GridWeight):
        product = weight.linear(x, bias)
    else:
        product = functional.linear(x, weight, bias)
    if is_gelu:
        assert out is None
        return gelu_tanh(product)
    return product if out is None else out.copy_(product)


def linear_splits(x: Activations, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias).unsqueeze(0)


def sum_splits(parts: Tensor, out: Tensor) -> Tensor:
    return out.copy_(parts.sum(0, dtype=torch.promote_types(parts.dtype, torch.float32)))


def gated_linear(
    x: Activations,
    weight: Weight,
    bias: Tensor | None = None,
    is_gelu: bool = False,
    reader: Weight | None = None,  # noqa: ARG001 - products round what they read
) -> Activations:
    return silu_and_mul(linear(x, weight, bias), is_gelu)
