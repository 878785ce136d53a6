# SPDX-License-Identifier: Apache-2.0
"""A whole product with a weight, by the kernel that choice.py names; for 4 and 8 bits, by quantized/product.py."""

import torch
from torch import Tensor

from lightllm_backend.kernels.activation.gelu_tanh import gelu_tanh
from lightllm_backend.kernels.linear.choice import choice_for
from lightllm_backend.kernels.linear.linear_splits import launch_product
from lightllm_backend.kernels.linear.sum_splits import sum_splits
from lightllm_backend.kernels.quantized.product import quantized_gelu, quantized_parts
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import QuantizedWeight, Weight


def linear(
    x: Activations, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None, is_gelu: bool = False
) -> Tensor:
    if is_gelu:
        assert out is None
        fused = quantized_gelu(x, weight, bias) if isinstance(weight, QuantizedWeight) else None
        return gelu_tanh(linear(x, weight, bias)) if fused is None else fused
    tokens, out_features = x.shape[0], weight.shape[0]
    if isinstance(weight, QuantizedWeight):
        parts = quantized_parts(x, weight, bias)
        if out is None and len(parts) == 1:
            return parts[0]
        return sum_splits(parts, parts.new_empty(parts.shape[1:], dtype=x.dtype) if out is None else out)
    assert isinstance(x, Tensor)
    if out is None:
        out = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    assert isinstance(weight, Tensor)
    choice = choice_for(x, weight, bias)
    if choice.blocks is None:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    if choice.blocks.splits == 1:
        launch_product(x, weight, bias, out.unsqueeze(0), choice)
        return out
    parts = torch.empty((choice.blocks.splits, tokens, out_features), dtype=torch.float32, device=x.device)
    launch_product(x, weight, bias, parts, choice)
    return sum_splits(parts, out)
