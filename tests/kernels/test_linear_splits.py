# SPDX-License-Identifier: Apache-2.0
"""linear_splits: the parts add up to the reference's product."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.linear_blocks import LinearBlocks
from lightllm_backend.kernels.linear_splits import launch
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


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "splits"), [(24, 1), (24, 2), (72, 1), (104, 2), (64, 1)])
def test_a_program_takes_any_number_of_rows(rows, splits, with_bias, device):
    """Those that its tile has more are another program's, or behind the last: nothing is written there."""
    x, weight = (torch.randn(count, 256, device=device).to(DTYPE) for count in (3, 200))
    bias = torch.randn(200, device=device).to(DTYPE) if with_bias else None
    buffer = torch.full((splits * 3 * 200 + 100,), 7.0, device=device)
    parts = buffer[: splits * 3 * 200].view(splits, 3, 200)
    launch(x, weight, bias, parts, LinearBlocks(rows, 64, 3, 4, splits))
    expected = reference.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert relative_error(parts.sum(0), expected) < TOLERANCE[DTYPE]
    assert (buffer[splits * 3 * 200 :] == 7).all()


def test_what_is_left_to_cublas_is_one_part(device):
    x, weight = torch.randn(70, 64, device=device), torch.randn(48, 64, device=device)
    assert torch.equal(launchers.linear_splits(x, weight), reference.linear(x, weight).unsqueeze(0))
