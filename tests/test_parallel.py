# SPDX-License-Identifier: Apache-2.0
"""TensorParallel: one rank does nothing; two processes exchange tensors."""

from __future__ import annotations

import subprocess
import sys

import torch

from lightllm_backend.parallel import TensorParallel

RANK = """
import sys, torch
from lightllm_backend.parallel import TensorParallel
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
parallel = TensorParallel(rank, 2)
x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (rank + 1)
assert parallel.all_gather(x).tolist() == [[1, 2, 2, 4], [3, 4, 6, 8]]
assert parallel.broadcast(x.clone(), 1).tolist() == [[2, 4], [6, 8]]
assert parallel.all_reduce(x).tolist() == [[3, 6], [9, 12]]
torch.distributed.destroy_process_group()
"""


def test_one_rank_returns_its_argument():
    x = torch.ones(2, 3)
    parallel = TensorParallel()
    assert parallel.all_reduce(x) is x
    assert parallel.all_gather(x) is x
    assert parallel.broadcast(x) is x


def test_two_ranks_exchange_tensors(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")]) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
