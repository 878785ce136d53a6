# SPDX-License-Identifier: Apache-2.0
"""linear_splits: the parts add up to the reference's product, and how a product is cut."""

import pytest
import torch

from lightllm_backend.kernels import launchers, linear_splits, reference
from tests.kernels.kernel_harness import TOLERANCE, relative_error

DTYPE = torch.float16  # see test_linear


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features", "splits"), [(64, 1024, 8), (192, 512, 4), (1024, 128, 1)])
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


def test_splits_divide_the_work_and_the_inner_dimension():
    for out_features, in_features in [(4096, 4096), (4096, 11008), (12288, 4096), (64, 128), (576, 1536)]:
        blocks = linear_splits.choose_blocks(out_features, in_features, (9, 0), 132)
        assert blocks is not None
        assert in_features % (blocks.splits * linear_splits.BLOCK_INNER) == 0
        assert blocks.prefetched <= in_features // blocks.splits
        assert 2 * blocks.prefetched * out_features * blocks.splits <= linear_splits.PREFETCH_BYTES
    assert linear_splits.choose_blocks(4096, 4096, (9, 0), 132).splits == 2
    assert linear_splits.choose_blocks(12288, 4096, (9, 0), 132).splits == 1
    assert linear_splits.choose_blocks(4096, 4096, (7, 0), 80) is None
