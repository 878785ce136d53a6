# SPDX-License-Identifier: Apache-2.0
"""TensorParallel: this process's rank, and the collective operations that join the parts of a model.

There is one process per GPU. `connect` makes torch.distributed's default process group, whose ranks are these ranks:
NCCL on GPUs, gloo on a CPU. GPUs of one host that can read each other's memory sum the messages of a decode step
through symmetric memory instead, at half of NCCL's latency (perf.all_reduce). What fits the Lamport buffers there is
exchanged through them by kernels of our own: the sums in norms and of embeddings, and logits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from lightllm_backend.kernels.collective.lamport_buffers import EMPTY, LamportBuffers, bits_type_of

# Up to this size each rank reads the whole message of every other; beyond, each sums a part and all read the sums.
# perf.all_reduce finds where the second way becomes faster.
ONE_SHOT_BYTES = 256 << 10
# torch's kernels read vectors of this size and cut a message into one part per rank.
VECTOR_BYTES = 16
# The largest message that goes through Lamport buffers, which take 2 * ranks times its size: 256 MiB with 8 ranks.
MAILED_BYTES = 16 << 20

# How long ranks may wait for each other: a step on a CPU may take minutes. That a host is lost is noticed otherwise.
GROUP_TIMEOUT = timedelta(minutes=10)

# torch 2.13 has renamed all_gather_into_tensor.
_all_gather: Callable[[Tensor, Tensor], object] = getattr(
    torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor
)

log = logging.getLogger("lightllm.parallel")


@dataclass(frozen=True)
class TensorParallel:
    """This process's rank among `size`. With one rank, every operation returns its argument."""

    rank: int = 0
    size: int = 1
    one_host: bool = field(default=True, kw_only=True)  # all ranks are on this host
    symmetric: SymmetricMemory | None = field(default=None, kw_only=True, repr=False)

    @classmethod
    def connect(
        cls, rank: int, size: int, device: torch.device, store: str | Store, one_host: bool = True
    ) -> TensorParallel:
        """Connect to the other ranks through `store`, or through the new file of this name. Waits for all of them."""
        if size > 1:
            is_cuda = device.type == "cuda"
            if isinstance(store, str):
                store = torch.distributed.FileStore(store, size)  # type: ignore[attr-defined]
            torch.distributed.init_process_group(
                "nccl" if is_cuda else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=GROUP_TIMEOUT,
                device_id=device if is_cuda else None,  # NCCL connects now, not in the first step
            )
        return cls(rank, size, one_host=one_host)

    def with_symmetric_memory(
        self, rows: int, columns: int, dtype: torch.dtype, device: torch.device
    ) -> TensorParallel:
        """Add symmetric memory for messages of up to [rows, columns], if the GPUs support it. Collective."""
        if self.size == 1 or device.type != "cuda":
            return self
        if not self.one_host:
            log.info("all-reduce is NCCL's: the ranks are on several hosts, which have no symmetric memory")
            return self
        reason = ""
        try:
            symmetric = SymmetricMemory(self.rank, self.size, rows, columns, dtype, device)
            symmetric.check(self.rank)
        except Exception as error:  # noqa: BLE001 (NCCL works without symmetric memory, whatever the error is)
            reason = f"{type(error).__name__}: {error}"
        if self.minimum(0 if reason else 1, device) == 0:
            log.warning("all-reduce is NCCL's; no symmetric memory: %s", reason or "another rank has none")
            return self
        return replace(self, symmetric=symmetric)

    def product_buffer(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """A buffer for a product [rows, columns] that goes to `all_reduce` next, to save a copy, or None for any."""
        return self.symmetric.view((rows, columns), dtype) if self.symmetric else None

    @property
    def _lamport_buffers(self) -> LamportBuffers | None:
        return self.symmetric.lamport_buffers if self.symmetric else None

    def lamport_buffers(self, rows: int, columns: int) -> LamportBuffers | None:
        """Buffers in which kernels sum messages of [rows, columns], or None to use `all_reduce`."""
        buffers = self._lamport_buffers
        return buffers if buffers is not None and buffers.fit(rows, columns) else None

    def gathering_buffers(self, rows: int, columns: int) -> LamportBuffers | None:
        """Buffers in which a kernel gathers messages of [rows, columns], or None to use `all_gather`."""
        buffers = self._lamport_buffers
        return buffers if buffers is not None and buffers.fit_in_pieces(rows, columns) else None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`. It may overwrite `x`."""
        if self.size == 1:
            return x
        buffer = self.symmetric.view(x.shape, x.dtype) if self.symmetric else None
        if self.symmetric is None or buffer is None:
            torch.distributed.all_reduce(x)
            return x
        if x.data_ptr() != buffer.data_ptr():
            buffer.copy_(x)
        return self.symmetric.all_reduce(buffer)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate all ranks' `x` [..., n] in order of rank: [..., size * n]."""
        if self.size == 1:
            return x
        parts = x.new_empty((self.size, *x.shape))
        _all_gather(parts.flatten(0, 1), x.contiguous())
        return parts.movedim(0, -2).flatten(-2)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Copy rank `source`'s `x` into every other rank's."""
        if self.size > 1:
            torch.distributed.broadcast(x, src=source)
        return x

    def minimum(self, value: int, device: torch.device) -> int:
        """The minimum of all ranks' values. Waits for the device."""
        if self.size == 1:
            return value
        least = torch.tensor(value, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return int(least)


class SymmetricMemory:
    """One buffer per rank that all GPUs of the group map, with sums over them by torch's kernels; and Lamport buffers.

    The buffer and its addresses never change, so CUDA graphs may use them. The kernels begin and end with a barrier of
    all ranks: when a sum is there, every rank has read this rank's buffer, and the next message may overwrite it. Sums
    are new tensors. All ranks add in order of rank, so their sums agree to the last bit. The kernels take float32 and
    bfloat16. We do not use the multicast (NVLS) kernels.
    """

    lamport_buffers: LamportBuffers | None

    def __init__(self, rank: int, size: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        """Collective. Raises the error of torch or of the driver if there is no symmetric memory."""
        from torch.distributed import _symmetric_memory

        for other in range(size):
            for one in range(other):
                if not torch.cuda.can_device_access_peer(one, other):
                    raise RuntimeError(f"GPUs {one} and {other} cannot read each other's memory")
        self._granularity = VECTOR_BYTES * size // dtype.itemsize
        # Older versions of torch lack this kernel, which takes these numbers of ranks only.
        self._two_shot_has_output = size in (2, 4, 8) and hasattr(torch.ops.symm_mem, "two_shot_all_reduce_out")
        num_elements = -(-rows * columns // self._granularity) * self._granularity
        group = torch.distributed.group.WORLD
        assert group is not None, "connect() comes first"
        self._group_name: str = group.group_name
        with torch.inference_mode(mode=False):
            self._buffer = _symmetric_memory.empty(num_elements, dtype=dtype, device=device)
        # Kept alive: the kernels look the handle up by the buffer and the group.
        self._handle = _symmetric_memory.rendezvous(self._buffer, self._group_name)

        bits = bits_type_of(dtype)
        shape = (2, size, max(1, MAILED_BYTES // (columns * bits.itemsize)), columns)
        with torch.inference_mode(mode=False):
            own = _symmetric_memory.empty(shape, dtype=bits, device=device)
        self._lamport_handle = handle = _symmetric_memory.rendezvous(own, self._group_name)
        own.fill_(EMPTY)
        handle.barrier()  # no rank may write before all are EMPTY
        offset = (own.data_ptr() - handle.buffer_ptrs[rank]) // bits.itemsize
        by_rank = [own if other == rank else handle.get_buffer(other, shape, bits, offset) for other in range(size)]
        self.lamport_buffers = LamportBuffers.of(by_rank, rank)

    def view(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The beginning of the buffer as a tensor of this shape, or None if the kernels cannot take it there."""
        count = math.prod(shape)
        fits = dtype == self._buffer.dtype and 0 < count <= self._buffer.numel() and count % self._granularity == 0
        return self._buffer[:count].view(shape) if fits else None

    def all_reduce(self, view: Tensor) -> Tensor:
        """The sum of all ranks' views, as a new tensor. Destroys the views' content."""
        if view.numel() * view.itemsize <= ONE_SHOT_BYTES:
            return self.one_shot(view)
        return self.two_shot(view)

    def one_shot(self, view: Tensor) -> Tensor:
        """The sum, for which each rank reads the whole view of every other."""
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce_out(
            view, "sum", self._group_name, torch.empty_like(view)
        )
        return total

    def two_shot(self, view: Tensor) -> Tensor:
        """The sum, of which each rank computes one part and reads the others."""
        if self._two_shot_has_output:
            total: Tensor = torch.ops.symm_mem.two_shot_all_reduce_out(
                view, "sum", self._group_name, torch.empty_like(view)
            )
            return total
        return self.two_shot_in_place(view).clone()

    def two_shot_in_place(self, view: Tensor) -> Tensor:
        """The two-shot sum in the buffer itself, where the next message overwrites it."""
        total: Tensor = torch.ops.symm_mem.two_shot_all_reduce_(view, "sum", self._group_name)
        return total

    def check(self, rank: int) -> None:
        """Sum the largest and the smallest message in both ways; RuntimeError if a sum is wrong."""
        ranks = torch.distributed.get_world_size()
        for count in (self._granularity, self._buffer.numel()):
            view = self._buffer[:count]
            pattern = torch.arange(count, device=view.device) % 5
            expected = (ranks * pattern + ranks * (ranks - 1) // 2).to(view.dtype)
            for kernel in (self.one_shot, self.two_shot):
                view.copy_(pattern + rank)
                if not torch.equal(kernel(view), expected):
                    raise RuntimeError(f"a sum of {count} values is wrong")
