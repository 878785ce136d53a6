# SPDX-License-Identifier: Apache-2.0
"""The parts of layers that tensor parallelism adds: shares of the vocabulary, and where products are written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightllm_backend.kernels import reference
from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, LamportBuffers
from lightllm_backend.models.linear import RowLinear
from lightllm_backend.models.llama import RMSNorm
from lightllm_backend.models.placement import Placement
from lightllm_backend.models.vocabulary import Embedding, Head
from lightllm_backend.parallel import TensorParallel
from tests.models.step_harness import CPU
from tests.test_parallel import PrivateMemory


class OneOfMany(TensorParallel):
    """A rank whose sums and gathers are its own part."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x] * self.size, dim=-1)


def place(rank: int, size: int) -> Placement:
    return Placement(OneOfMany(rank, size), torch.float32, CPU, reference)


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 64, 65, 199, 32000, 32001])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_each_token_is_held_once_and_shares_are_equal(vocab_size, size):
    shares = [place(rank, size).vocabulary_share(vocab_size) for rank in range(size)]
    assert len({rows for rows, _, _ in shares}) == 1
    held = [token for _, start, count in shares for token in range(start, start + count)]
    assert held == list(range(vocab_size))
    rows = shares[0][0]
    assert rows * size >= vocab_size
    assert all(start == min(rank * rows, vocab_size) for rank, (_, start, _) in enumerate(shares))


@pytest.mark.parametrize(("vocab_size", "size"), [(199, 4), (9, 4), (32, 2), (5, 1)])
def test_embeddings_add_up_and_padding_is_never_seen(vocab_size, size):
    table = torch.randn(vocab_size, 6)
    ids = torch.randint(vocab_size, (40,), dtype=torch.int32)
    x = torch.randn(3, 6)
    total, logits = torch.zeros(40, 6), []
    for rank in range(size):
        embedding = Embedding(vocab_size, 6, place(rank, size))
        embedding.weight.fill_(torch.nan)  # what no tensor of the checkpoint fills
        slot = embedding.weight_map("table")["table"]
        slot.target.copy_(table[slot.part()])
        total += embedding(ids)
        head = Head(embedding, tied=True, place=place(rank, size))
        logits.append((x @ head.weight.t())[:, : head.num_held])
        assert head(x).shape == (3, vocab_size)
    assert torch.equal(total, table[ids.long()])
    torch.testing.assert_close(torch.cat(logits, -1), x @ table.t())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_linear_writes_its_product_where_the_others_read_it(rank, bias):
    memory = PrivateMemory(64, torch.float32)
    parallel = TensorParallel(rank, 2, symmetric=memory)
    linear = RowLinear("down", 6, 8, bias, Placement(parallel, torch.float32, CPU, reference))
    linear.weight.normal_()
    x = torch.randn(4, 3)
    expected = 2 * x @ linear.weight.t()
    if linear.bias is not None:
        linear.bias.normal_()
        expected += 2 * linear.bias * (rank == 0)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), expected)
    assert memory.sums == ["one shot"]


@pytest.mark.parametrize("tokens", [2, 4])
def test_a_norm_sums_products_that_fit_through_lamport_buffers(tokens):
    """Those of 2 tokens; those of 4 are too many."""
    memory = PrivateMemory(64, torch.float32)
    buffers = [torch.full((2, 2, 3, 8), EMPTY, dtype=torch.int32) for _ in range(2)]
    memory.lamport_buffers = LamportBuffers.of(buffers, 1)
    here = Placement(TensorParallel(1, 2, symmetric=memory), torch.float32, CPU, reference)
    linear = RowLinear("down", 6, 8, False, here)
    linear.weight.normal_()
    norm = RMSNorm("norm", SimpleNamespace(norm_eps=1e-5, hidden_size=8), here)
    norm.weight.normal_()
    x, residual = torch.randn(tokens, 3), torch.randn(tokens, 8)
    product = x @ linear.weight.t()
    # What the other rank sends is what PrivateMemory adds.
    buffers[1][0, 0, :tokens] = product[:3].view(torch.int32)
    expected = reference.rms_norm(residual + 2 * product, norm.weight, norm.eps)
    with torch.inference_mode():
        torch.testing.assert_close(norm(linear.unsummed(x), residual), expected)
    assert memory.sums == ([] if tokens == 2 else ["one shot"])
