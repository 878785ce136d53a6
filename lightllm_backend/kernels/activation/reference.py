# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the activations."""

from torch import Tensor
from torch.nn import functional


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the first half of `gate_up` [tokens, 2 * features], times its second half."""
    gate, up = gate_up.chunk(2, -1)
    return (functional.silu(gate.float()) * up.float()).to(gate_up.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU of `x` [tokens, features] in its approximation by tanh, as in BLOOM."""
    return functional.gelu(x, approximate="tanh")
