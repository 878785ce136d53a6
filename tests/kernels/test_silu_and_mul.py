# SPDX-License-Identifier: Apache-2.0
"""silu_and_mul: the reference against the formula in float64, the kernel against the reference."""

from dataclasses import replace

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.activation.silu_and_mul import rounded_silu_and_mul
from tests.kernels.kernel_harness import TOLERANCE, relative_error
from tests.kernels.quantized_weights import random_weight

# The interpreter computes with numpy, which warns of the overflow that a GPU turns into the right 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow")


def test_reference_is_the_formula():
    gate_up = torch.randn(3, 14)
    gate, up = gate_up[:, :7].double(), gate_up[:, 7:].double()
    assert relative_error(reference.silu_and_mul(gate_up), gate / (1 + torch.exp(-gate)) * up) < 1e-6
    gelu = gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    assert relative_error(reference.silu_and_mul(gate_up, is_gelu=True), gelu * up) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (3, 37), (2, 1025)])
def test_kernel_matches_the_reference(dtype, tokens, features, is_gelu, device):
    gate_up = (torch.randn(tokens, 2 * features + 5, device=device) * 4).to(dtype)[:, : 2 * features]
    out = launchers.silu_and_mul(gate_up, is_gelu)
    assert out.dtype == dtype
    assert relative_error(out, reference.silu_and_mul(gate_up, is_gelu)) < TOLERANCE[dtype]


@pytest.mark.parametrize("is_gelu", [False, True])
def test_large_gates_do_not_overflow(is_gelu, device):
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 1.0]], device=device)
    assert launchers.silu_and_mul(gate_up, is_gelu).tolist() == [[0.0, 200.0]]


def test_no_tokens(device):
    assert launchers.silu_and_mul(torch.empty(0, 8, device=device)).shape == (0, 4)


@pytest.mark.parametrize("is_gelu", [False, True])
def test_rounded_activations_are_those_that_quantize_tokens_rounds(is_gelu, device):
    reader = replace(random_weight("fp8", 16, 192, 192, device), quantizes_input=True, in_fragments=True)
    gate_up = torch.randn(3, 384, device=device).half()
    rounded = rounded_silu_and_mul(gate_up, is_gelu, reader)
    values, scales = launchers.quantize_tokens(launchers.silu_and_mul(gate_up, is_gelu), reader)
    assert torch.equal(rounded.scales, scales)
    assert torch.equal(rounded.values.view(torch.int8), values.view(torch.int8))
    assert (rounded.shape, rounded.dtype) == ((3, 192), torch.float16)
