# SPDX-License-Identifier: Apache-2.0
"""TensorParallel: one rank does nothing; two processes exchange tensors."""

from __future__ import annotations

import multiprocessing

import torch

from lightllm_backend.parallel import SymmetricMemory, TensorParallel


def run_rank(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    cpu = torch.device("cpu")
    parallel = TensorParallel.connect(rank, 2, cpu, meeting)
    assert (parallel.rank, parallel.size) == (rank, 2)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (rank + 1)
    assert parallel.all_gather(x).tolist() == [[1, 2, 2, 4], [3, 4, 6, 8]]
    assert parallel.all_gather(x.bfloat16().t()).tolist() == [[1, 3, 2, 6], [2, 4, 4, 8]]
    assert parallel.minimum(7 - rank, cpu) == 6
    assert parallel.with_symmetric_memory(2, 4, torch.float32, cpu) is parallel, "there is none on a CPU"
    assert parallel.broadcast(x.clone(), 1).tolist() == [[2, 4], [6, 8]]
    assert parallel.all_reduce(x.bfloat16()).tolist() == [[3, 6], [9, 12]]
    assert parallel.all_reduce(x).tolist() == [[3, 6], [9, 12]]
    torch.distributed.destroy_process_group()


def test_one_rank_returns_its_argument():
    x = torch.ones(2, 3)
    parallel = TensorParallel()
    assert parallel.all_reduce(x) is x
    assert parallel.all_gather(x) is x
    assert parallel.broadcast(x) is x
    assert parallel.minimum(5, x.device) == 5
    assert parallel.product_buffer(2, 3, x.dtype) is None
    assert TensorParallel.connect(0, 1, x.device, "/nowhere") == parallel


def test_two_ranks_exchange_tensors(tmp_path):
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, str(tmp_path / "meeting"))) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


class PrivateMemory(SymmetricMemory):
    """A buffer that nobody else has; a sum is as if two ranks had written the same, and loses the buffer's content."""

    def __init__(self, num_elements: int, dtype: torch.dtype) -> None:
        self._granularity = 8
        self._buffer = torch.zeros(num_elements, dtype=dtype)
        self.lamport_buffers = None
        self.sums: list[str] = []

    def one_shot(self, view: torch.Tensor) -> torch.Tensor:
        return self._sum(view, "one shot")

    def two_shot(self, view: torch.Tensor) -> torch.Tensor:
        return self._sum(view, "two shots")

    def _sum(self, view: torch.Tensor, how: str) -> torch.Tensor:
        self.sums.append(how)
        total = view * 2
        view.fill_(torch.nan)
        return total


def test_messages_that_fit_go_through_symmetric_memory():
    memory = PrivateMemory(1 << 17, torch.float32)
    parallel = TensorParallel(0, 2, symmetric=memory)
    small, large = torch.full((2, 4), 3.0), torch.full((256, 512), 4.0)
    assert torch.equal(parallel.all_reduce(small), torch.full((2, 4), 6.0))
    assert torch.equal(parallel.all_reduce(large), torch.full((256, 512), 8.0))
    assert memory.sums == ["one shot", "two shots"]
    assert torch.equal(small, torch.full((2, 4), 3.0)), "it was copied"


def test_a_product_in_the_buffer_is_not_copied():
    memory = PrivateMemory(64, torch.float32)
    parallel = TensorParallel(0, 2, symmetric=memory)
    product = parallel.product_buffer(2, 8, torch.float32)
    product.fill_(1.5)
    total = parallel.all_reduce(product)
    assert torch.equal(total, torch.full((2, 8), 3.0))
    assert product.isnan().all(), "the buffer itself was summed"


def test_messages_that_do_not_fit_have_no_buffer():
    parallel = TensorParallel(0, 2, symmetric=PrivateMemory(64, torch.float32))
    assert parallel.product_buffer(8, 8, torch.float32).shape == (8, 8)
    assert parallel.product_buffer(9, 8, torch.float32) is None, "too large"
    assert parallel.product_buffer(3, 4, torch.float32) is None, "not whole vectors for each rank"
    assert parallel.product_buffer(0, 8, torch.float32) is None, "empty"
    assert parallel.product_buffer(8, 8, torch.bfloat16) is None, "of another type"
