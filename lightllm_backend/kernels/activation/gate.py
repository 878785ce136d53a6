# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The activations of gates, for all kernels that have one."""

import triton
import triton.language as tl


@triton.jit
def activated(gate, is_gelu: tl.constexpr):
    """SiLU of float32 numbers, or GELU approximated by tanh."""
    argument = gate
    if is_gelu:
        # (1 + tanh(y)) / 2 is sigmoid(2 y), with y = sqrt(2 / pi) * (x + 0.044715 x^3).
        argument = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    return gate * tl.sigmoid(argument)
