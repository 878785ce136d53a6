# SPDX-License-Identifier: Apache-2.0
"""gated_linear: the kernel, and what it leaves to others, against the reference."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, relative_error

DTYPE = torch.float16  # see test_linear


def test_reference_is_the_formula():
    x, weight, bias = torch.randn(3, 5), torch.randn(14, 5), torch.randn(14)
    gate, up = (x.double() @ weight.double().T + bias.double()).chunk(2, 1)
    assert relative_error(reference.gated_linear(x, weight, bias), gate / (1 + (-gate).exp()) * up) < 1e-6
    gelu = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert relative_error(reference.gated_linear(x, weight, bias, is_gelu=True), gelu) < 1e-6


@pytest.mark.parametrize(("with_bias", "is_gelu"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("tokens", [0, 1, 17, 65])
@pytest.mark.parametrize(("features", "in_features"), [(256, 256), (32, 256), (30, 128)])  # one part, splits, cuBLAS
def test_matches_the_reference(tokens, features, in_features, with_bias, is_gelu, device):
    x = torch.randn(tokens, in_features + 8, device=device).to(DTYPE)[:, :in_features]
    weight = torch.randn(2 * features, in_features, device=device).to(DTYPE) / in_features**0.5
    bias = torch.randn(2 * features, device=device).to(DTYPE) if with_bias else None
    out = launchers.gated_linear(x, weight, bias, is_gelu)
    assert (out.shape, out.dtype) == ((tokens, features), DTYPE)
    expected = reference.gated_linear(x.float(), weight.float(), None if bias is None else bias.float(), is_gelu)
    assert relative_error(out, expected) < TOLERANCE[DTYPE]
