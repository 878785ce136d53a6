# SPDX-License-Identifier: Apache-2.0
"""all_gather: one rank whose buffer the others have filled; ranks that wait are in test_all_reduce_rms_norm."""

from types import ModuleType

import pytest
import torch

from lightllm_backend.kernels import launchers, reference
from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, LamportBuffers, bits_type_of
from tests.kernels.test_all_reduce_rms_norm import empty_buffers, is_empty_but_for


@pytest.mark.parametrize("implementation", [reference, launchers])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "rank", "rows", "columns", "dim"),
    [(2, 0, 3, 40, 64), (4, 2, 2, 100, 48)],  # in one piece, in three
)
def test_parts_lie_side_by_side(implementation: ModuleType, dtype, ranks, rank, rows, columns, dim, device):
    pieces = -(-columns // dim)
    buffers = empty_buffers(ranks, 7, dim, dtype, device)
    own, bits_type = LamportBuffers.of(buffers, rank), bits_type_of(dtype)
    assert own.pieces(columns) == pieces
    for turn in (0, 1):
        parts = torch.randn(ranks, rows, columns, device=device).to(dtype)
        in_pieces = torch.zeros(ranks, rows, pieces * dim, dtype=dtype, device=device)
        in_pieces[:, :, :columns] = parts
        bits = in_pieces.view(ranks, rows * pieces, dim).view(bits_type)
        for other in set(range(ranks)) - {rank}:
            buffers[rank][turn, other, : rows * pieces] = bits[other]
        gathered = implementation.all_gather(parts[rank], own)
        assert torch.equal(gathered, torch.cat(list(parts), 1))
        assert own.turns.tolist() == [1 - turn] * (rows * pieces) + [0] * (7 - rows * pieces)
        for other in set(range(ranks)) - {rank}:
            there = buffers[other][turn, rank, : rows * pieces].view(rows, pieces * dim)
            assert torch.equal(there[:, :columns], parts[rank].view(bits_type))
            there.fill_(EMPTY)
            assert is_empty_but_for(buffers[other], other), "nothing else is written"
        # The kernel reads no padding, and leaves it: here it is cleared for the next turn.
        left = buffers[rank][turn, :, : rows * pieces].view(ranks, rows, pieces * dim)
        others = [other for other in range(ranks) if other != rank]
        assert (left[others, :, :columns] == EMPTY).all(), "what was read is empty again"
        left.fill_(EMPTY)


@pytest.mark.parametrize("implementation", [reference, launchers])
def test_no_rows(implementation, device):
    own = LamportBuffers.of(empty_buffers(2, 1, 8, torch.float32, device), 0)
    assert implementation.all_gather(torch.empty(0, 12, device=device), own).shape == (0, 24)


def test_rows_that_do_not_fit():
    own = LamportBuffers.of(empty_buffers(2, 6, 8, torch.float32, torch.device("cpu")), 0)
    assert own.fit_in_pieces(6, 8)
    assert own.fit_in_pieces(2, 17)
    assert not own.fit_in_pieces(3, 17), "each takes three rows"
