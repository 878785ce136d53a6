# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the products with weights; kernels/interface.py says what each function computes."""

from torch import Tensor
from torch.nn import functional

from lightllm_backend.kernels.activation.reference import silu_and_mul


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    product = functional.linear(x, weight, bias)
    return product if out is None else out.copy_(product)


def linear_splits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias).unsqueeze(0)


def sum_splits(parts: Tensor, out: Tensor) -> Tensor:
    return out.copy_(parts.sum(0))


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return silu_and_mul(functional.linear(x, weight, bias))
