# SPDX-License-Identifier: Apache-2.0
"""token_attention_int8 by its own name, against naive softmax; test_token_attention has its shapes and variants."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, make_pool, naive_attention, new_tokens, relative_error


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("shape", [(3, 3, 16), (4, 2, 80), (2, 1, 128)])
def test_it_is_attention_over_the_values_that_the_int8_stand_for(implementation, shape, device):
    heads, kv_heads, head_dim = shape
    pool = make_pool([40, 1, 0, 7], kv_heads, head_dim, torch.float32, device).to_int8()
    new, pool = new_tokens(pool, heads, torch.float32, head_dim)
    query, other = new.q.clone(), [torch.zeros(pool.k.shape, device=device) for _ in "kv"]
    reference.rotary_kv_write(query, new.k.clone(), new.v, new.cos, new.sin, new.slots, *other)
    table, scale = (pool.req_to_token, pool.rows, pool.context_lengths), head_dim**-0.5
    out = implementation.token_attention_int8(*new, pool.k, pool.v, pool.scales, *table, 40, scale)
    live = pool.context_lengths > 0
    expected = naive_attention(query[live], pool, live.tolist(), scale)  # over the pool with the new tokens
    assert relative_error(out[live], expected) < TOLERANCE[torch.float32]
    assert (out[~live] == 0).all()


def test_other_pools_are_refused(device):
    pool = make_pool([4], 1, 16, torch.float32, device)
    new, pool = new_tokens(pool, 2, torch.float32)
    table = (pool.req_to_token, pool.rows, pool.context_lengths, 4, 0.25)
    with pytest.raises(AssertionError):
        launchers.token_attention_int8(*new, pool.k, pool.v, torch.ones(13, 1, 2, device=device), *table)
