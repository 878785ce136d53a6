# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch of the activations; kernels/interface.py says what each function computes."""

from torch import Tensor
from torch.nn import functional


def silu_and_mul(gate_up: Tensor, is_gelu: bool = False) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    activated = gelu_tanh(gate.float()) if is_gelu else functional.silu(gate.float())
    return activated.mul_(up).to(gate_up.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")
