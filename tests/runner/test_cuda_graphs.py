# SPDX-License-Identifier: Apache-2.0
"""Which batch sizes are captured. That a replay computes the same as a launch is tested on a GPU."""

import pytest

from lightllm_backend.runner.cuda_graphs import batch_size_buckets


@pytest.mark.parametrize("largest", [1, 2, 16, 63, 64, 65, 250, 256, 1000, 4000])
def test_every_size_has_a_bucket_that_is_not_much_larger(largest: int) -> None:
    buckets = batch_size_buckets(largest)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == largest
    for size in range(1, largest + 1):
        bucket = next(bucket for bucket in buckets if bucket >= size)
        assert bucket - size < max(4, 8 if size >= 32 else 0, size / 7)
