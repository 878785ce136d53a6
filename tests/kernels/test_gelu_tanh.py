# SPDX-License-Identifier: Apache-2.0
"""gelu_tanh: the reference against transformers' BLOOM, the kernel against the reference."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, relative_error

# The interpreter computes with numpy, which warns of the overflow that a GPU turns into the right 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow")


def test_reference_is_that_of_transformers():
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    x = torch.randn(50, 31) * 3
    assert relative_error(reference.gelu_tanh(x), bloom.bloom_gelu_forward(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (3, 37), (2, 1025)])
def test_kernel_matches_the_reference(dtype, tokens, features, device):
    x = (torch.randn(tokens, features + 5, device=device) * 4).to(dtype)[:, :features]
    out = launchers.gelu_tanh(x)
    assert out.dtype == dtype
    assert relative_error(out, reference.gelu_tanh(x.float())) < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_large_values_do_not_overflow(implementation, device):
    assert implementation.gelu_tanh(torch.tensor([[-200.0, 200.0, 0.0]], device=device)).tolist() == [[0.0, 200.0, 0.0]]


def test_no_tokens(device):
    assert launchers.gelu_tanh(torch.empty(0, 8, device=device)).shape == (0, 8)
