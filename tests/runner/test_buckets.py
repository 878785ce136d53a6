# SPDX-License-Identifier: Apache-2.0
"""Which shapes of steps are captured, and which one a batch takes. Replays are tested on a GPU."""

import random

import numpy as np
import pytest

from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.buckets import BucketChoice, batch_size_buckets, graph_tokens, step_buckets
from lightllm_backend.runner.step_arrays import Bucket


def batch_of(decodes: int, prompts: list[int]) -> Batch:
    lengths = np.array([1] * decodes + prompts, np.int32)
    rows, slots = np.arange(len(lengths), dtype=np.int32), np.zeros((1, lengths.sum()), np.int32)
    return Batch(rows, np.zeros_like(rows), lengths, slots, np.ones(len(rows), bool), decodes, ())


@pytest.mark.parametrize("largest", [1, 2, 16, 63, 64, 65, 250, 256, 1000, 4000])
def test_every_size_has_a_bucket_that_is_not_much_larger(largest: int) -> None:
    buckets = batch_size_buckets(largest)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == largest
    for size in range(1, largest + 1):
        bucket = next(bucket for bucket in buckets if bucket >= size)
        assert bucket - size < max(4, 8 if size >= 32 else 0, size / 7)
    assert set(range(128, largest + 1, 128)) <= set(buckets)


@pytest.mark.parametrize("rows", [1, 5, 16, 200, 512, 1000])
@pytest.mark.parametrize("budget", [10, 60, 512, 8192])
@pytest.mark.parametrize("max_graph_tokens", [256, 512, 2048, 3072])
def test_buckets_keep_within_the_limits(rows: int, budget: int, max_graph_tokens: int) -> None:
    buckets = step_buckets(rows, budget, max_graph_tokens)
    assert len(set(buckets)) == len(buckets) < 220
    for bucket in buckets:
        assert bucket.decodes <= rows
        assert bucket.prefills <= min(bucket.tokens, rows)
        assert bucket.tokens <= (min(max_graph_tokens, rows + budget) if bucket.prefills else rows)
        assert bucket.decodes < bucket.tokens if bucket.prefills else bucket.decodes == bucket.tokens
    choose = BucketChoice(buckets)
    for decodes in range(1, rows + 1, 7):
        assert choose(batch_of(decodes, [])).prefills == 0


@pytest.mark.parametrize("rows", [16, 1000])
def test_short_prompts_have_a_bucket_that_is_not_much_larger(rows: int) -> None:
    choose = BucketChoice(step_buckets(rows, 8192, 512))
    for decodes in range(0, min(rows, 192) + 1, 5):
        for tokens in range(1, 257, 3):
            bucket = choose(batch_of(decodes, [tokens]))
            assert bucket is not None
            assert bucket.tokens < max(65, 1.5 * (decodes + tokens)), (decodes, tokens, bucket)


def test_the_bucket_with_the_fewest_tokens_is_chosen() -> None:
    source = random.Random(1)
    buckets = step_buckets(300, 1000, 700)
    choose = BucketChoice(buckets)
    for _ in range(500):
        prompts = [source.randint(1, 60) for _ in range(source.randint(0, 20))]
        needed = Bucket.of(batch_of(decodes := source.randint(0 if prompts else 1, 320), prompts))
        alike = [bucket for bucket in buckets if (bucket.prefills > 0) == (len(prompts) > 0)]
        room = [b.tokens for b in alike if all(has >= needs for has, needs in zip(b, needed, strict=True))]
        chosen = choose(batch_of(decodes, prompts))
        assert (chosen.tokens if chosen else None) == min(room, default=None)


def test_models_that_compute_long_for_a_token_have_graphs_of_fewer() -> None:
    seven_billion = 6_700_000_000
    assert graph_tokens(32, seven_billion) == 2944
    assert graph_tokens(32, seven_billion // 2) > 2944
    assert graph_tokens(80, 69_000_000_000) == 768
    assert graph_tokens(80, 69_000_000_000, in_8_bits=True) == 1408
    assert graph_tokens(30, 135_000_000) == 3072


def test_a_step_with_a_long_prompt_takes_no_graph() -> None:
    choose = BucketChoice(step_buckets(512, 8192, 3072))
    assert choose(batch_of(500, [2048])).tokens == 2560
    assert choose(batch_of(0, [2049])) is None
    assert choose(batch_of(8, [100, 2049, 100])) is None
    assert choose(batch_of(8, [1500, 1400])).tokens == 2944
