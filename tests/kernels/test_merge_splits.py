# SPDX-License-Identifier: Apache-2.0
"""merge_splits: attention over the parts, joined, is attention over the whole."""

from itertools import pairwise

import pytest
import torch

from lightllm_backend.kernels import launchers, merge_splits, reference


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bounds", [[0, 40], [0, 1, 17, 17, 40], [0, 0, 40, 40]])
def test_joined_parts_are_the_whole(implementation, dtype, bounds, device):
    scores = torch.randn(2, 3, 40, device=device) * 20
    values = torch.randn(2, 3, 40, 24, device=device)
    splits = len(bounds) - 1
    # An empty part's values are never read.
    partial = torch.full((2, 3, splits, 24), torch.nan, device=device)
    log_sums = torch.full((2, 3, splits), -torch.inf, device=device)
    for split, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            partial[:, :, split] = torch.einsum(
                "nht,nhtd->nhd", scores[..., start:end].softmax(-1), values[:, :, start:end]
            )
            log_sums[:, :, split] = scores[..., start:end].logsumexp(-1) / torch.log(torch.tensor(2.0))
    expected = torch.einsum("nht,nhtd->nhd", scores.softmax(-1), values)
    out = implementation.merge_splits(partial, log_sums, partial.new_empty(2, 3, 24, dtype=dtype))
    assert out.dtype == dtype
    assert torch.allclose(out.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_where_nothing_is_seen_nothing_is_written(implementation, device):
    partial = torch.full((1, 2, 3, 8), torch.nan, device=device)
    log_sums = torch.full((1, 2, 3), -torch.inf, device=device)
    assert (implementation.merge_splits(partial, log_sums, partial.new_full((1, 2, 8), 7.0)) == 7).all()


def test_split_count():
    assert merge_splits.split_count(8192, 4096, 132) == 1
    assert merge_splits.split_count(8, 60, 132) == 1
    assert merge_splits.split_count(32, 4096, 132) == 33
    assert merge_splits.split_count(8, 100_000, 132) == 64
    counts = [merge_splits.split_count(programs, 8192, 132) for programs in (1, 32, 64, 256, 1024, 4096)]
    assert counts == sorted(counts, reverse=True)
