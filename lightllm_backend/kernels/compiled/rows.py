# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-calls
"""What a step does with each token's row beside products and attention: the norm, and the gate of an MLP."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.kernels import reference
from lightllm_backend.kernels.compiled.numbers import DTYPES, array, compiled, exp, load, normed, rounded
from lightllm_backend.kernels.norm.reference import sum_of_parts
from lightllm_backend.kernels.quantized.weight import Weight

# With more numbers PyTorch's threads win.
_FEW = 1 << 15


@compiled
def _add_and_norm(
    x: NDArray[Any],
    weight: NDArray[Any],
    post_weight: NDArray[Any] | None,
    eps: float,
    residual: NDArray[Any],
    out: NDArray[Any],
) -> None:
    dim = x.shape[1]
    for token in range(x.shape[0]):
        added = x[token]
        if post_weight is not None:
            added = out[token]
            normed(x[token], post_weight, eps, added)
        total = np.float32(0.0)
        for i in range(dim):
            number = rounded(load(added[i]) + load(residual[token, i]), residual)
            residual[token, i] = number
            total += load(number) * load(number)
        factor = np.float32(1.0) / np.sqrt(total / np.float32(dim) + np.float32(eps))
        for i in range(dim):
            normalized = rounded(load(residual[token, i]) * factor, weight)
            out[token, i] = rounded(load(normalized) * load(weight[i]), out)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, post_weight: Tensor | None = None
) -> Tensor:
    x = sum_of_parts(x)
    if residual is None or x.numel() > _FEW or x.dtype != residual.dtype or x.dtype not in DTYPES:
        return reference.rms_norm(x, weight, eps, residual, post_weight)
    out = residual.new_empty(residual.shape)
    post = None if post_weight is None else array(post_weight)
    _add_and_norm(array(x), array(weight), post, eps, array(residual), array(out))
    return out


@compiled
def _silu_and_mul(gate_up: NDArray[Any], is_gelu: bool, out: NDArray[Any]) -> None:
    features = out.shape[1]
    for token in range(out.shape[0]):
        for i in range(features):
            gate = load(gate_up[token, i])
            up = load(gate_up[token, features + i])
            argument = gate
            if is_gelu:  # see activation/gate.py
                cubic = np.float32(1.0) + np.float32(0.044715) * gate * gate
                argument = np.float32(1.5957691216057308) * gate * cubic
            out[token, i] = rounded(gate / (np.float32(1.0) + exp(-argument)) * up, out)


def silu_and_mul(gate_up: Tensor, is_gelu: bool = False) -> Tensor:
    if gate_up.numel() > _FEW or gate_up.dtype not in DTYPES:
        return reference.silu_and_mul(gate_up, is_gelu)
    out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    _silu_and_mul(array(gate_up), is_gelu, array(out))
    return out


def gated_linear(x: Tensor, weight: Weight, bias: Tensor | None = None, is_gelu: bool = False) -> Tensor:
    return silu_and_mul(reference.linear(x, weight, bias), is_gelu)
