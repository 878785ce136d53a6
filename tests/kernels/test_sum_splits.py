# SPDX-License-Identifier: Apache-2.0
"""sum_splits: the kernel against the reference."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 37), (8, 2, 1025)])
def test_kernel_matches_the_reference(dtype, shape, device):
    parts = torch.randn(shape, device=device)
    expected = parts.double().sum(0)
    for implementation in (launchers, reference):
        out = torch.full(shape[1:], torch.nan, dtype=dtype, device=device)
        assert implementation.sum_splits(parts, out) is out
        assert relative_error(out, expected) < TOLERANCE[dtype]


def test_parts_in_16_bits(device):
    parts = torch.randn(4, 3, 37, device=device).bfloat16()
    expected = parts.double().sum(0)
    for implementation in (launchers, reference):
        out = implementation.sum_splits(parts, torch.empty_like(expected, dtype=torch.float32))
        assert relative_error(out, expected) < TOLERANCE[torch.float32]


def test_no_tokens(device):
    out = torch.empty(0, 8, device=device)
    assert launchers.sum_splits(torch.empty(2, 0, 8, device=device), out).shape == (0, 8)
