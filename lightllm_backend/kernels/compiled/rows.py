# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-calls
"""What a step does with each token's row beside products and attention: the norm, and the gate of an MLP."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.kernels import reference
from lightllm_backend.kernels.compiled.numbers import (
    DTYPES,
    LIKE,
    array,
    compiled,
    exp,
    lasting_array,
    load,
    matrix,
    normed,
    rounded,
)
from lightllm_backend.kernels.quantized.rounded_tokens import Activations
from lightllm_backend.kernels.quantized.weight import Weight

# With more numbers PyTorch's threads win.
_FEW = 1 << 15


@compiled
def _add_and_norm(
    of_x: int,
    of_residual: int,
    of_out: int,
    tokens: int,
    like: NDArray[Any],
    weight: NDArray[Any],
    post_weight: NDArray[Any] | None,
    eps: float,
) -> None:
    """The three matrices at these addresses have the type of `like`."""
    dim = len(weight)
    x, residual, out = (
        matrix(of_x, tokens, dim, like), matrix(of_residual, tokens, dim, like), matrix(of_out, tokens, dim, like)
    )  # fmt: skip
    for token in range(tokens):
        added = x[token]
        if post_weight is not None:
            added = out[token]
            normed(x[token], post_weight, eps, added)
        total = np.float32(0.0)
        for i in range(dim):
            number = rounded(load(added[i]) + load(residual[token, i]), like)
            residual[token, i] = number
            total += load(number) * load(number)
        factor = np.float32(1.0) / np.sqrt(total / np.float32(dim) + np.float32(eps))
        for i in range(dim):
            normalized = rounded(load(residual[token, i]) * factor, weight)
            out[token, i] = rounded(load(normalized) * load(weight[i]), like)


def _is_plain(x: Tensor, weight: Tensor, residual: Tensor) -> bool:
    """Whether `x` is not in several parts, and is like `residual`."""
    return (
        x.dtype == residual.dtype
        and x.dtype in DTYPES
        and weight.dtype in DTYPES
        and x.numel() == residual.numel() <= _FEW
        and x.is_contiguous()
        and residual.is_contiguous()
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    post_weight: Tensor | None = None,
    reader: Weight | None = None,  # noqa: ARG001 - products round what they read
) -> Activations:
    if residual is None or not _is_plain(x, weight, residual):
        return reference.rms_norm(x, weight, eps, residual, post_weight)
    out = torch.empty_like(residual)
    addresses = x.data_ptr(), residual.data_ptr(), out.data_ptr()
    post = None if post_weight is None else lasting_array(post_weight)
    _add_and_norm(*addresses, residual.shape[0], LIKE[x.dtype], lasting_array(weight), post, eps)
    return out


@compiled
def gelu_argument(x: Any) -> Any:
    """What the sigmoid takes in GELU: see activation/gate.py."""
    return np.float32(1.5957691216057308) * x * (np.float32(1.0) + np.float32(0.044715) * x * x)


@compiled
def _silu_and_mul(gate_up: NDArray[Any], is_gelu: bool, out: NDArray[Any]) -> None:
    features = out.shape[1]
    for token in range(out.shape[0]):
        for i in range(features):
            gate = load(gate_up[token, i])
            up = load(gate_up[token, features + i])
            argument = gelu_argument(gate) if is_gelu else gate
            out[token, i] = rounded(gate / (np.float32(1.0) + exp(-argument)) * up, out)


def silu_and_mul(gate_up: Tensor, is_gelu: bool = False) -> Tensor:
    if gate_up.numel() > _FEW or gate_up.dtype not in DTYPES:
        return reference.silu_and_mul(gate_up, is_gelu)
    out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    _silu_and_mul(array(gate_up), is_gelu, array(out))
    return out
