# SPDX-License-Identifier: Apache-2.0
"""token_attention_int8 is what token_attention does over pools of int8; test_token_attention has its shapes."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, make_pool, new_tokens, relative_error


@pytest.mark.parametrize("shape", [(3, 3, 16), (4, 2, 80), (2, 1, 128)])
def test_it_is_token_attention(shape, device):
    heads, kv_heads, head_dim = shape
    pool = make_pool([40, 1, 0, 7], kv_heads, head_dim, torch.float32, device).to_int8()
    new, pool = new_tokens(pool, heads, torch.float32, head_dim)
    table = (pool.req_to_token, pool.rows, pool.context_lengths, 40, head_dim**-0.5)
    outputs = []
    for implementation in (launchers, reference):
        for int8_only in (True, False):
            k, v, scales = pool.k.clone(), pool.v.clone(), pool.scales.clone()
            if int8_only:
                outputs.append(implementation.token_attention_int8(*new, k, v, scales, *table))
            else:
                outputs.append(implementation.token_attention(*new, k, v, *table, scales=scales))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])
    assert relative_error(outputs[0], outputs[2]) < TOLERANCE[torch.float32]


def test_other_pools_are_refused(device):
    pool = make_pool([4], 1, 16, torch.float32, device)
    new, pool = new_tokens(pool, 2, torch.float32)
    table = (pool.req_to_token, pool.rows, pool.context_lengths, 4, 0.25)
    with pytest.raises(AssertionError):
        launchers.token_attention_int8(*new, pool.k, pool.v, torch.ones(13, 1, 2, device=device), *table)
