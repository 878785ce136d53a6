# SPDX-License-Identifier: Apache-2.0
"""layer_norm: the reference against the formula in float64, the kernel against the reference."""

from dataclasses import replace

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.norm.layer_norm import rounded_layer_norm
from tests.kernels.kernel_harness import TOLERANCE, relative_error
from tests.kernels.quantized_weights import random_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_formula(dtype):
    x, weight, bias = (
        torch.randn(5, 33, dtype=dtype) * 3 + 2,
        torch.randn(33, dtype=dtype),
        torch.randn(33, dtype=dtype),
    )
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double() + bias.double()
    assert relative_error(reference.layer_norm(x, weight, bias, 1e-3), expected) < TOLERANCE[dtype]


def test_epsilon_counts():
    x = torch.tensor([[1e-3, -1e-3]])
    expected = torch.tensor([[0.5**0.5, -(0.5**0.5)]])
    assert torch.allclose(reference.layer_norm(x, torch.ones(2), torch.zeros(2), 1e-6), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (3, 7), (1, 576), (4, 1000)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_kernel_matches_the_reference(dtype, tokens, dim, with_residual, device):
    # A view with a row stride of its own.
    x = (torch.randn(tokens, 2 * dim + 3, device=device) * 2 + 1).to(dtype)[:, 1 : dim + 1]
    weight, bias = (torch.randn(dim, device=device).to(dtype) for _ in range(2))
    residual = torch.randn(tokens, dim, device=device).to(dtype) if with_residual else None
    expected_residual = residual.clone() if with_residual else None
    before = x.clone()
    out = launchers.layer_norm(x, weight, bias, 1e-5, residual)
    expected = reference.layer_norm(x, weight, bias, 1e-5, expected_residual)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert torch.equal(x, before)
    if with_residual:
        # The interpreter truncates to bfloat16 where a GPU rounds.
        tolerance = TOLERANCE[dtype] if dtype == torch.bfloat16 else 0.0
        assert relative_error(residual, expected_residual) <= tolerance


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_a_large_mean_costs_no_precision(implementation, device):
    x = torch.randn(2, 300, device=device) + 1000
    weight, bias = torch.ones(300, device=device), torch.zeros(300, device=device)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    expected = centred / centred.pow(2).mean(-1, keepdim=True).sqrt()
    assert relative_error(implementation.layer_norm(x, weight, bias, 1e-9), expected) < 2e-4


def test_no_tokens(device):
    empty, ones = torch.empty(0, 8, device=device), torch.ones(8, device=device)
    assert launchers.layer_norm(empty, ones, ones, 1e-5).shape == (0, 8)


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("with_residual", [False, True])
def test_parts_are_summed(implementation, with_residual, device):
    parts = torch.randn(3, 5, 37, device=device)
    weight, bias = torch.randn(2, 37, device=device).half()
    residual = torch.randn(5, 37, device=device).half() if with_residual else None
    total = parts.sum(0) if residual is None else (parts.sum(0) + residual).half()
    out = implementation.layer_norm(parts, weight, bias, 1e-5, residual)
    assert out.dtype == torch.float16
    assert (
        relative_error(
            out,
            reference.layer_norm(
                total.float(),
                *(
                    w.float()
                    for w in (
                        weight,
                        bias,
                    )
                ),
                1e-5,
            ),
        )
        < 1e-3
    )
    assert residual is None or relative_error(residual, total) < 1e-3


@pytest.mark.parametrize("is_static", [False, True])
def test_rounded_norms_are_those_that_quantize_tokens_rounds(is_static, device):
    weight, bias, residual = (torch.randn(shape, device=device).half() for shape in (128, 128, (5, 128)))
    reader = random_weight("fp8", 16, 128, 128, device)
    input_scale = torch.full((1,), 0.01, device=device) if is_static else None
    reader = replace(reader, quantizes_input=True, in_fragments=True, input_scale=input_scale)
    parts, added = torch.randn(2, 5, 128, device=device), residual.clone()
    rounded = rounded_layer_norm(parts, weight, bias, 1e-5, residual, reader)
    values, scales = launchers.quantize_tokens(launchers.layer_norm(parts, weight, bias, 1e-5, added), reader)
    assert torch.equal(residual, added)
    assert torch.equal(rounded.scales, scales)
    assert torch.equal(rounded.values.view(torch.int8), values.view(torch.int8))
    assert (rounded.shape, rounded.dtype) == ((5, 128), torch.float16)
