# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the products with weights."""

from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.activation.reference import silu_and_mul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x` [tokens, in_features] times `weight` [out_features, in_features] transposed, plus `bias` [out_features].

    With `out` [tokens, out_features], which is contiguous, the result is written there.
    """
    product = functional.linear(x, weight, bias)
    return product if out is None else out.copy_(product)


def linear_splits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of `linear` in parts [splits, tokens, out_features] whose sum it is: float32, or one of x's type."""
    return functional.linear(x, weight, bias).unsqueeze(0)


def sum_splits(parts: Tensor, out: Tensor) -> Tensor:
    """The sum of `parts` [splits, tokens, features], float32, over its splits, into `out` [tokens, features]."""
    return out.copy_(parts.sum(0))


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu_and_mul of `linear`: `weight` [2 * features, in_features] is the gate's, then the other's."""
    return silu_and_mul(functional.linear(x, weight, bias))
