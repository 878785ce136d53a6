# SPDX-License-Identifier: Apache-2.0
"""Prompts of which nothing is cached: into which tiles they are cut, and that others are left to the general kernel."""

import numpy as np
import pytest
import torch

from lightllm_backend.kernels import launchers, prefill_attention, reference
from lightllm_backend.kernels.whole_prompts import TILE_TOKENS, WholePrompts, whole_prompt_tiles
from tests.kernels.kernel_harness import TOLERANCE, make_pool, relative_error, split_new, starts_of


def _int32(*values):
    return np.array(values, np.int32)


def test_each_tile_of_whole_prompts_is_there_once():
    starts, lengths = _int32(9, 0, 0, 0, 40, 0, 0), _int32(1, 1, 1, 300, 500, 128, 129)
    tiles = whole_prompt_tiles(starts, lengths, num_decodes=2)
    assert tiles.dtype == np.int32
    assert sorted(map(tuple, tiles.tolist())) == [
        (2, 1, 0), (3, 300, 0), (3, 300, 1), (3, 300, 2), (803, 128, 0), (931, 129, 0), (931, 129, 1)
    ]  # fmt: skip


def test_long_prompts_begin_and_tiles_with_few_keys_end():
    lengths = np.random.default_rng(0).integers(1, 2000, 50).astype(np.int32)
    tiles = whole_prompt_tiles(np.zeros_like(lengths), lengths, num_decodes=0)
    keys = np.minimum(tiles[:, 1], (tiles[:, 2] + 1) * TILE_TOKENS)
    assert tiles[0, 1] == lengths.max()
    last = keys[-len(keys) // 4 :]
    assert (np.diff(last) <= 0).all()


@pytest.mark.parametrize(("starts", "decodes"), [((5, 7), 1), ((3,), 1), ((0,), 1)])
def test_there_may_be_none(starts, decodes):
    assert whole_prompt_tiles(_int32(*starts), np.ones(len(starts), np.int32), decodes).shape == (0, 3)


class _Hopper:
    """In place of the kernel: attention of the whole prompts by the reference."""

    def __init__(self, pool, queries):
        self.pool, self.queries, self.calls = pool, queries, 0

    def is_made_for(self, *_):
        return True

    def prefill_attention_hopper(self, q, k, v, tiles, scale, out):
        self.calls += 1
        starts = starts_of(self.queries, q.device).tolist()
        for sequence in {starts.index(first) for first in tiles[:, 0].tolist()}:
            one = slice(sequence, sequence + 1)
            ends = torch.tensor([starts[sequence], starts[sequence + 1]], device=q.device, dtype=torch.int32)
            table = (self.pool.req_to_token, self.pool.rows[one], ends, self.pool.context_lengths[one])
            reference.prefill_attention(q, k, v, self.pool.k, self.pool.v, *table, scale, out=out)


@pytest.mark.parametrize("contexts", [[40, 9, 65, 30, 3], [40, 9, 65, 17, 3], [70, 9, 66, 18, 4]])
def test_the_general_kernel_computes_the_others(contexts, device, monkeypatch):
    queries = [40, 9, 65, 17, 3]
    pool = make_pool(contexts, 2, 64, torch.float32, device)
    q = torch.randn(sum(queries), 4, 64, device=device)
    k, v, cached = split_new(pool, queries, len(q), torch.float32)
    rest = (pool.req_to_token, pool.rows, starts_of(queries, device), pool.context_lengths, 0.125)
    expected = reference.prefill_attention(q, k, v, pool.k, pool.v, *rest)
    starts = np.array(contexts, np.int32) - np.array(queries, np.int32)
    tiles = whole_prompt_tiles(starts, np.array(queries, np.int32), 0)
    hopper = _Hopper(pool, queries)
    monkeypatch.setattr(prefill_attention, "hopper", hopper)
    whole = WholePrompts(torch.from_numpy(tiles).to(device), are_all=not starts.any())
    out = torch.full_like(q, torch.nan)
    # The pool holds no new tokens for it, so what it computes itself it cannot have from there.
    launchers.prefill_attention(q, k, v, cached.k, cached.v, *rest, whole_prompts=whole, out=out)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert hopper.calls == 1
    slopes = torch.zeros(4, device=device)
    launchers.prefill_attention(q, k, v, cached.k, cached.v, *rest, slopes, whole_prompts=whole, out=out)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert hopper.calls == 1, "it knows no ALiBi"
