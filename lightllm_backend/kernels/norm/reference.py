# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the norms."""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root-mean-square norm of `x` [tokens, dim]; with a residual, that of `residual += x`, changed in place.

    `x` may be the parts [splits, tokens, dim] of a product, see linear_splits; their sum is meant. The result is of the
    weight's type. The residual must not come from the kernel launched right before: on a GPU it is read ahead, see
    kernels.dependent_launch.
    """
    x = sum_of_parts(x)
    if residual is not None:
        residual += x
        x_float = residual.float()
    else:
        x_float = x.float()
    normalized = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    # Rounded before the product with the weight, as the models were trained.
    return weight * normalized.to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Layer norm of `x` [tokens, dim]; with a residual, that of `residual += x`, changed in place.

    `x` may be the parts [splits, tokens, dim] of a product, and the residual is read ahead, as for rms_norm.
    """
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
