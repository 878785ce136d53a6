# SPDX-License-Identifier: Apache-2.0
"""rms_norm: the reference against the formula in float64, the kernel against the reference."""

from dataclasses import replace

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.norm.rms_norm import paired_rms_norm, rounded_rms_norm
from lightllm_backend.kernels.quantized.reference import pair_tokens
from tests.kernels.kernel_harness import TOLERANCE, relative_error
from tests.kernels.quantized_weights import random_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_formula(dtype):
    x, weight = torch.randn(5, 33, dtype=dtype) * 3, torch.randn(33, dtype=dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert relative_error(reference.rms_norm(x, weight, 1e-3), expected) < TOLERANCE[dtype]


def test_epsilon_counts():
    x = torch.full((1, 4), 1e-3)
    assert torch.allclose(reference.rms_norm(x, torch.ones(4), 1e-6), torch.full((1, 4), 0.5**0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (3, 7), (1, 576), (4, 1000)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_kernel_matches_the_reference(dtype, tokens, dim, with_residual, device):
    # A view with a row stride of its own.
    x = (torch.randn(tokens, 2 * dim + 3, device=device) * 2).to(dtype)[:, 1 : dim + 1]
    weight = torch.randn(dim, device=device).to(dtype)
    residual = torch.randn(tokens, dim, device=device).to(dtype) if with_residual else None
    expected_residual = residual.clone() if with_residual else None
    before = x.clone()
    out = launchers.rms_norm(x, weight, 1e-5, residual)
    expected = reference.rms_norm(x, weight, 1e-5, expected_residual)
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert torch.equal(x, before)
    if with_residual:
        # The interpreter truncates to bfloat16 where a GPU rounds.
        tolerance = TOLERANCE[dtype] if dtype == torch.bfloat16 else 0.0
        assert relative_error(residual, expected_residual) <= tolerance


def test_residual_is_the_rounded_sum(device):
    x = torch.randn(2, 65, device=device).half()
    residual = torch.randn(2, 65, device=device).half()
    expected = (x.float() + residual.float()).half()
    launchers.rms_norm(x, torch.ones(65, device=device).half(), 1e-5, residual)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.float32, torch.float32), (torch.float16, torch.float32)])
@pytest.mark.parametrize("in_parts", [False, True])
def test_what_is_added_is_normed_with_a_post_norm(implementation, dtype, weight_dtype, in_parts, device):
    x = torch.randn(3 if in_parts else 1, 5, 70, device=device)
    weight, post_weight = torch.randn(2, 70, device=device).to(weight_dtype)
    residual = torch.randn(5, 70, device=device).to(dtype)
    wide = x.double().sum(0)
    added = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * post_weight.double()
    total = residual.double() + added
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    out = implementation.rms_norm(x if in_parts else x[0].to(dtype), weight, 1e-3, residual, post_weight)
    assert out.dtype == dtype
    assert relative_error(residual, total) < TOLERANCE[dtype]
    assert relative_error(out, expected) < 2 * TOLERANCE[dtype]


def test_no_tokens(device):
    empty = torch.empty(0, 8, device=device)
    assert launchers.rms_norm(empty, torch.ones(8, device=device), 1e-5).shape == (0, 8)


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("with_residual", [False, True])
def test_parts_are_summed(implementation, with_residual, device):
    parts = torch.randn(3, 5, 37, device=device)
    weight = torch.randn(37, device=device).half()
    residual = torch.randn(5, 37, device=device).half() if with_residual else None
    total = parts.sum(0) if residual is None else (parts.sum(0) + residual).half()
    out = implementation.rms_norm(parts, weight, 1e-5, residual)
    assert out.dtype == (torch.float32 if residual is None else torch.float16)
    assert relative_error(out, reference.rms_norm(total.float(), *(w.float() for w in (weight,)), 1e-5)) < 1e-3
    assert residual is None or relative_error(residual, total) < 1e-3


@pytest.mark.parametrize("is_static", [False, True])
def test_rounded_norms_are_those_that_quantize_tokens_rounds(is_static, device):
    weight, residual = torch.randn(128, device=device).half(), torch.randn(5, 128, device=device).half()
    reader = random_weight("fp8", 16, 128, 128, device)
    input_scale = torch.full((1,), 0.01, device=device) if is_static else None
    reader = replace(reader, quantizes_input=True, in_fragments=True, input_scale=input_scale)
    parts, added = torch.randn(2, 5, 128, device=device), residual.clone()
    rounded = rounded_rms_norm(parts, weight, 1e-5, residual, None, reader)
    values, scales = launchers.quantize_tokens(launchers.rms_norm(parts, weight, 1e-5, added), reader)
    assert torch.equal(residual, added)
    assert torch.equal(rounded.scales, scales)
    assert torch.equal(rounded.values.view(torch.int8), values.view(torch.int8))
    assert (rounded.shape, rounded.dtype) == ((5, 128), torch.float16)


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("dim", [128, 192])
def test_paired_norms_are_pairs_of_the_norm(kind, dim, device):
    weight, residual = torch.randn(dim, device=device).bfloat16(), torch.randn(5, dim, device=device).bfloat16()
    residual[2] = 0.0
    residual[3, 7] = 200.0
    reader = replace(random_weight(kind, 16, dim, dim, device), in_fragments=True)
    parts, added = torch.randn(2, 5, dim, device=device), residual.clone()
    parts[:, 2] = 0.0
    paired = paired_rms_norm(parts, weight, 1e-5, residual, None, reader)
    expected = pair_tokens(launchers.rms_norm(parts, weight, 1e-5, added), reader)
    assert torch.equal(residual, added)
    assert torch.equal(paired.scales, expected.scales)
    assert (paired.shape, paired.dtype, len(paired)) == ((5, dim), torch.bfloat16, 5)
    got, numbers = (pairs.values.float().view(5, 2, dim) for pairs in (paired, expected))
    if kind == "fp8" and device.type == "cpu":
        # The interpreter (3.9) loses the carry of a fraction rounded up to 2, of subnormal numbers (below 2**-6) any.
        size = numbers.abs()
        is_sound = (size.frexp().mantissa != 0.5) & ((size >= 2**-6) | (size == 0))
        compared = is_sound.all(1, keepdim=True).expand(5, 2, dim)
        assert compared.float().mean() > 0.5
        got, numbers = got[compared], numbers[compared]
    assert torch.equal(got, numbers)
