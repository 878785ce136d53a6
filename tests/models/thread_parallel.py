# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel ranks within one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, LamportBuffers
from lightllm_backend.parallel import TensorParallel


@dataclass(frozen=True)
class ThreadParallel(TensorParallel):
    """Ranks that are threads of this process and exchange their tensors through a list."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    shared: list[Tensor | None] = field(default_factory=list)
    lamport_buffers_of_all: LamportBuffers | None = field(default=None, compare=False)

    @property
    def _lamport_buffers(self) -> LamportBuffers | None:
        return self.lamport_buffers_of_all

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), dim=-1)

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.shared[self.rank] = x.clone()
        self.barrier.wait(timeout=60)
        everyone = list(self.shared)
        self.barrier.wait(timeout=60)
        return everyone


def run_ranks(size: int, run: Callable[[TensorParallel], None], buffer_rows: int = 0, buffer_columns: int = 0) -> None:
    """`run` on each rank, at the same time; the first error of any ends them all.

    Products of up to so many rows, if any, are float32 and go through Lamport buffers into a norm that takes them.
    """
    barrier, shared = threading.Barrier(size), [None] * size
    shape = (2, size, buffer_rows, buffer_columns)
    by_rank = [torch.full(shape, EMPTY, dtype=torch.int32) for _ in range(size)]

    def run_rank(rank: int) -> None:
        buffers = LamportBuffers.of(by_rank, rank) if buffer_rows else None
        try:
            run(ThreadParallel(rank, size, barrier, shared, buffers))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(run_rank, range(size)))
