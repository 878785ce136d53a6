# SPDX-License-Identifier: Apache-2.0
"""Prompts of which nothing is cached have a kernel of their own, which is not run here; others have the general one."""

import numpy as np
import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.attention import prefill_attention
from lightllm_backend.kernels.attention.whole_prompt_tiles import WholePromptTiles
from lightllm_backend.runner.prompt_tiling import order_tiles
from tests.kernels.kernel_harness import TOLERANCE, make_pool, relative_error, split_new, starts_of


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
    tiles = order_tiles(starts, np.array(queries, np.int32), 0)
    hopper = _Hopper(pool, queries)
    monkeypatch.setattr(prefill_attention, "hopper", hopper)
    whole = WholePromptTiles(torch.from_numpy(tiles).to(device), are_all=not starts.any())
    out = torch.full_like(q, torch.nan)
    # The pool holds no new tokens for it, so what it computes itself it cannot have from there.
    launchers.prefill_attention(q, k, v, cached.k, cached.v, *rest, whole_prompts=whole, out=out)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert hopper.calls == 1
    slopes = torch.zeros(4, device=device)
    launchers.prefill_attention(q, k, v, cached.k, cached.v, *rest, slopes, whole_prompts=whole, out=out)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert hopper.calls == 1, "it knows no ALiBi"
