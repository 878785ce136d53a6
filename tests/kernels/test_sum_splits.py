# SPDX-License-Identifier: Apache-2.0
"""sum_splits: the kernel against the reference."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 37), (8, 2, 1025)])
def test_kernel_matches_the_reference(dtype, shape, with_bias, device):
    partial = torch.randn(shape, device=device)
    bias = torch.randn(shape[2], device=device).to(dtype) if with_bias else None
    out = launchers.sum_splits(partial, bias, dtype)
    assert out.dtype == dtype
    expected = partial.double().sum(0) + (0 if bias is None else bias.double())
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert relative_error(reference.sum_splits(partial, bias, dtype), expected) < TOLERANCE[dtype]


def test_no_tokens(device):
    assert launchers.sum_splits(torch.empty(2, 0, 8, device=device), None, torch.float16).shape == (0, 8)
