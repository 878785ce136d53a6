# SPDX-License-Identifier: Apache-2.0
"""all_reduce_embeddings: one rank whose buffer others have filled; ranks that wait are in test_all_reduce_rms_norm."""

from types import ModuleType

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, LamportBuffers, bits_type_of
from tests.kernels.test_all_reduce_rms_norm import empty_buffers, is_empty_but_for


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first_id", "held"), [(10, 7), (20, 0)])  # the last rank's rows are all padding
def test_a_rank_adds_the_tokens_that_it_holds(implementation: ModuleType, dtype, first_id, held, device):
    rank, ranks, dim = first_id // 10, 3, 96
    buffers = empty_buffers(ranks, 6, dim, dtype, device)
    own, bits_type = LamportBuffers.of(buffers, rank), bits_type_of(dtype)
    whole = torch.randn(17, dim, device=device).to(dtype)
    weight = torch.full((10, dim), float("nan"), dtype=dtype, device=device)  # rows of no token
    weight[:held] = whole[first_id : first_id + held]
    for turn, ids in enumerate(([0, 9, 10, 16, 3, 3], [16, 0, 11, 10, 12, 3], [3, 10, 2, 0, 11, 10])):
        input_ids = torch.tensor(ids, dtype=torch.int32, device=device)
        expected = whole[input_ids.long()]
        for other in set(range(ranks)) - {rank}:
            is_held = (input_ids // 10 == other).unsqueeze(1)
            buffers[rank][turn % 2, other] = torch.where(is_held, expected, 0).view(bits_type)
        assert torch.equal(implementation.all_reduce_embeddings(input_ids, weight, first_id, held, own), expected)
        assert own.turns.tolist() == [1 - turn % 2] * len(ids)
        assert is_empty_but_for(buffers[rank], rank), "what was read is empty again"
        is_held = (input_ids // 10 == rank).unsqueeze(1)
        for other in set(range(ranks)) - {rank}:
            there = buffers[other][turn % 2, rank]
            assert torch.equal(there.view(dtype), torch.where(is_held, expected, 0))
            there.fill_(EMPTY)
            assert is_empty_but_for(buffers[other], other), "nothing else is written"


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_no_tokens(implementation, device):
    own = LamportBuffers.of(empty_buffers(2, 1, 8, torch.float32, device), 0)
    no_ids = torch.empty(0, dtype=torch.int32, device=device)
    assert implementation.all_reduce_embeddings(no_ids, torch.empty(3, 8, device=device), 0, 3, own).shape == (0, 8)
