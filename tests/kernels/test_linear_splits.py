# SPDX-License-Identifier: Apache-2.0
"""linear_splits: the parts add up to the reference's product."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, relative_error

DTYPE = torch.float16  # see test_linear


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features", "splits"), [(64, 1024, 8), (192, 512, 2), (1024, 128, 1)])
def test_parts_add_up(out_features, in_features, splits, with_bias, device):
    x, weight = (torch.randn(rows, in_features, device=device).to(DTYPE) for rows in (3, out_features))
    bias = torch.randn(out_features, device=device).to(DTYPE) if with_bias else None
    parts = launchers.linear_splits(x, weight, bias)
    assert parts.shape == (splits, 3, out_features)
    assert parts.dtype == (DTYPE if splits == 1 else torch.float32)
    expected = reference.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert relative_error(parts.float().sum(0), expected) < TOLERANCE[DTYPE]
    whole = reference.linear_splits(x.float(), weight.float(), None if bias is None else bias.float())
    assert relative_error(whole.sum(0), expected) < 1e-6


def test_what_is_left_to_cublas_is_one_part(device):
    x, weight = torch.randn(70, 64, device=device), torch.randn(48, 64, device=device)
    assert torch.equal(launchers.linear_splits(x, weight), reference.linear(x, weight).unsqueeze(0))
