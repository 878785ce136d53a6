# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The activations of gates, for all kernels that have one."""

import triton
import triton.language as tl

# 1 / (1 + 2**(-x * log2(e))), without the instructions that Triton-lang adds for subnormal numbers to each step.
SIGMOID = tl.constexpr(
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
    "rcp.approx.ftz.f32 $0, t; }"
)


@triton.jit
def activated(gate, is_gelu: tl.constexpr, is_ptx: tl.constexpr):
    """SiLU of float32 numbers, or GELU approximated by tanh."""
    argument = gate
    if is_gelu:
        # (1 + tanh(y)) / 2 is sigmoid(2 y), with y = sqrt(2 / pi) * (x + 0.044715 x^3).
        argument = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    if is_ptx:
        return gate * tl.inline_asm_elementwise(SIGMOID, "=f,f", [argument], dtype=tl.float32, is_pure=True, pack=1)
    return gate * tl.sigmoid(argument)
