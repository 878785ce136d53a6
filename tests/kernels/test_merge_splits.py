# SPDX-License-Identifier: Apache-2.0
"""merge_splits: attention over the parts, joined, is attention over the whole."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.attention import merge_splits


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_joined_parts_are_the_whole(implementation, dtype, splits, device):
    window, block_tokens = 35, 2
    contexts = [1, 2, 9, 33, 40]
    scores = torch.randn(5, 3, 40, device=device) * 20
    values = torch.randn(5, 3, 40, 24, device=device)
    partial = torch.full((5, 3, splits, 24), torch.nan, device=device)  # those of empty parts are not read
    log_sums = torch.full((5, 3, splits), torch.nan, device=device)
    expected = torch.empty(5, 3, 24, device=device)
    for index, context in enumerate(contexts):
        start = max(0, context - window)
        seen = scores[index, :, start:context], values[index, :, start:context]
        expected[index] = torch.einsum("ht,htd->hd", seen[0].softmax(-1), seen[1])
        blocks = -(-(context - start) // block_tokens)
        length = -(-blocks // splits) * block_tokens
        for split, (score, value) in enumerate(zip(*(part.split(length, 1) for part in seen), strict=True)):
            partial[index, :, split] = torch.einsum("ht,htd->hd", score.softmax(-1), value)
            log_sums[index, :, split] = score.logsumexp(-1) / torch.log(torch.tensor(2.0))
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    out = partial.new_empty(5, 3, 24, dtype=dtype)
    assert implementation.merge_splits(partial, log_sums, lengths, window, block_tokens, out) is out
    assert torch.allclose(out.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_where_nothing_is_seen_nothing_is_written(implementation, device):
    partial = torch.full((1, 2, 3, 8), torch.nan, device=device)
    log_sums = torch.full((1, 2, 3), torch.nan, device=device)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    out = partial.new_full((1, 2, 8), 7.0)
    assert (implementation.merge_splits(partial, log_sums, lengths, 0, 32, out) == 7).all()


def test_split_count():
    assert merge_splits.split_count(8192, 4096, 132, 1) == 1
    assert merge_splits.split_count(8, 60, 132, 1) == 1
    assert merge_splits.split_count(32, 4096, 132, 1) == 33
    assert merge_splits.split_count(32, 4096, 132, 2) == 16
    assert merge_splits.split_count(8, 100_000, 132, 1) == 64
    counts = [merge_splits.split_count(programs, 8192, 132, 1) for programs in (1, 32, 64, 256, 1024, 4096)]
    assert counts == sorted(counts, reverse=True)
