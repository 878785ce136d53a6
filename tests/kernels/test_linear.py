# SPDX-License-Identifier: Apache-2.0
"""linear: the kernel against the reference, for few tokens, and cuBLAS for what the kernel does not take."""

import pytest
import torch
from torch.nn import functional

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.linear import choice
from tests.kernels.kernel_harness import TOLERANCE, relative_error

DTYPE = torch.float16  # the interpreter's matrix products are wrong in bfloat16, which the GPU tests have


def test_reference_is_the_formula():
    x, weight, bias = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)
    assert relative_error(reference.linear(x, weight, bias), x.double() @ weight.double().T + bias.double()) < 1e-6
    assert relative_error(reference.linear(x, weight), x.double() @ weight.double().T) < 1e-6


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 128), (192, 512), (1024, 128)])
def test_kernel_matches_the_reference(tokens, out_features, in_features, with_out, with_bias, device):
    gpu = choice.Gpu((8, 0), multiprocessors=8)
    chosen = choice.choose_kernel(tokens, out_features, in_features, False, with_bias, gpu)
    assert chosen.kernel is choice.ProductKernel.SPLITS
    x = torch.randn(tokens, in_features + 8, device=device).to(DTYPE)[:, :in_features]
    weight = torch.randn(out_features, in_features, device=device).to(DTYPE)
    bias = torch.randn(out_features, device=device).to(DTYPE) if with_bias else None
    buffer = torch.full((tokens, out_features), torch.nan, device=device, dtype=DTYPE) if with_out else None
    out = launchers.linear(x, weight, bias, buffer)
    assert out.dtype == DTYPE
    assert buffer is None or out is buffer
    expected = reference.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert relative_error(out, expected) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("tokens", "shape"), [(65, (64, 128)), (2, (60, 128)), (2, (64, 120)), (0, (64, 128))])
def test_other_shapes_are_right_too(tokens, shape, with_bias, device):
    x, weight = torch.randn(tokens, shape[1], device=device).to(DTYPE), torch.randn(*shape, device=device).to(DTYPE)
    bias = torch.randn(shape[0], device=device).to(DTYPE) if with_bias else None
    expected = reference.linear(x, weight, bias)
    buffer = torch.full_like(expected, torch.nan)
    assert relative_error(launchers.linear(x, weight, bias), expected) < TOLERANCE[DTYPE]
    assert relative_error(launchers.linear(x, weight, bias, buffer), expected) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("tokens", [1, 65])
def test_gelu_of_the_product(implementation, tokens, device):
    x, weight = torch.randn(tokens, 128, device=device).to(DTYPE), torch.randn(64, 128, device=device).to(DTYPE) / 8
    bias = torch.randn(64, device=device).to(DTYPE)
    expected = functional.gelu(functional.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    assert relative_error(implementation.linear(x, weight, bias, is_gelu=True), expected) < TOLERANCE[DTYPE]
