# SPDX-License-Identifier: Apache-2.0
"""token_attention_int8 is what token_attention does over a pool of int8; test_token_attention has its shapes."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, make_pool, relative_error


@pytest.mark.parametrize("shape", [(3, 3, 16), (4, 2, 80), (2, 1, 128)])
def test_it_is_token_attention(shape, device):
    heads, kv_heads, head_dim = shape
    pool = make_pool([40, 1, 0, 7], kv_heads, head_dim, torch.float32, device).to_int8()
    q = torch.randn(4, heads, head_dim, device=device)
    scales, table = (pool.k_scales, pool.v_scales), (pool.req_to_token, pool.rows, pool.context_lengths, 40)
    for implementation in (launchers, reference):
        out = implementation.token_attention_int8(q, pool.k, pool.v, *scales, *table, head_dim**-0.5)
        same = implementation.token_attention(
            q, pool.k, pool.v, *table, head_dim**-0.5, k_scales=scales[0], v_scales=scales[1]
        )
        assert torch.equal(out, same)
        wide = pool.to(torch.float32)
        expected = reference.token_attention(q, wide.k, wide.v, *table, head_dim**-0.5)
        assert relative_error(out, expected) < TOLERANCE[torch.float32]


def test_other_pools_are_refused(device):
    pool = make_pool([4], 1, 16, torch.float32, device)
    scales, table = torch.ones(13, 1, device=device), (pool.req_to_token, pool.rows, pool.context_lengths, 4)
    with pytest.raises(AssertionError):
        launchers.token_attention_int8(torch.randn(1, 2, 16), pool.k, pool.v, scales, scales, *table, 0.25)
