# SPDX-License-Identifier: Apache-2.0
"""token_attention_mha is what token_attention does where heads share nothing; test_token_attention has its shapes."""

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from tests.kernels.kernel_harness import TOLERANCE, make_pool, relative_error


@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_it_is_token_attention(head_dim, device):
    pool = make_pool([40, 1, 0, 7], 3, head_dim, torch.float32, device)
    q = torch.randn(4, 3, head_dim, device=device)
    rest = (pool.req_to_token, pool.rows, pool.context_lengths, 40, head_dim**-0.5)
    expected = reference.token_attention(q, pool.k, pool.v, *rest)
    assert torch.equal(reference.token_attention_mha(q, pool.k, pool.v, *rest), expected)
    out = launchers.token_attention_mha(q, pool.k, pool.v, *rest)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert torch.equal(launchers.token_attention(q, pool.k, pool.v, *rest), out)


def test_shared_heads_are_refused(device):
    pool = make_pool([4], 1, 16, torch.float32, device)
    rest = (pool.req_to_token, pool.rows, pool.context_lengths, 4, 0.25)
    for implementation in (launchers, reference):
        with pytest.raises(AssertionError):
            implementation.token_attention_mha(torch.randn(1, 2, 16, device=device), pool.k, pool.v, *rest)
