# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the norms; kernels/interface.py says what each function computes."""

import torch
from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import Weight


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    post_weight: Tensor | None = None,
    reader: Weight | None = None,  # noqa: ARG001 - products round what they read
) -> Activations:
    x = sum_of_parts(x)
    if residual is not None:
        if post_weight is not None:
            x = rms_normed(x, post_weight, eps).to(residual.dtype)
        x = residual.add_(x)
    return rms_normed(x, weight, eps)


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    sums = torch.promote_types(x.dtype, torch.float32)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sums)
    normalized = x * length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    # Rounded before the product with the weight, as the models were trained.
    return normalized.to(weight.dtype).mul_(weight).to(x.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    reader: Weight | None = None,  # noqa: ARG001 - products round what they read
) -> Activations:
    x = sum_of_parts(x)
    if residual is not None:
        residual += x
        x = residual
    x = x.to(weight.dtype)
    return functional.layer_norm(x, (x.shape[1],), weight, bias, eps)


def sum_of_parts(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x
    return x[0] if len(x) == 1 else x.float().sum(0)
