# SPDX-License-Identifier: Apache-2.0
"""ModelRunner: computes one Batch on one device. It decides nothing; the Router has decided."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.layers import CausalLM, KVLayer
from lightllm_backend.router.batch import Batch, StepResult
from lightllm_backend.runner.cuda_graphs import CudaGraphs
from lightllm_backend.runner.device_batch import EMPTY_BATCH, Bucket, RequestTables
from lightllm_backend.runner.sampler import Sampler
from lightllm_backend.runner.staging import Staging
from lightllm_backend.runner.step import Step

# Steps whose results may be unread; more than the engine ever has in flight.
_RESULTS_IN_FLIGHT = 4


class _ResultBuffer:
    """Of one step: its tokens and log probabilities in pinned memory, and when it began and they were there."""

    def __init__(self, num_rows: int) -> None:
        self.tokens = torch.empty(num_rows, dtype=torch.int32, pin_memory=True)
        self.log_probs = torch.empty(num_rows, dtype=torch.float32, pin_memory=True)
        self.begun, self.done = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.step: PendingStep | None = None  # whose result it is


class PendingStep:
    """A step that the device may still be computing, or has computed in `seconds` where that is the host."""

    def __init__(
        self, tokens: Tensor, log_probs: Tensor | None, buffer: _ResultBuffer | None = None, seconds: float = 0.0
    ) -> None:
        self._buffer, self._seconds = buffer, seconds
        if buffer is not None:
            buffer.step = self
            tokens = buffer.tokens[: len(tokens)].copy_(tokens, non_blocking=True)
            if log_probs is not None:
                log_probs = buffer.log_probs[: len(log_probs)].copy_(log_probs, non_blocking=True)
            buffer.done.record()
        self._tokens, self._log_probs = tokens, log_probs

    def is_done(self) -> bool:
        """Whether result() would return at once."""
        return self._buffer is None or self._buffer.done.query()  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """Blocks until the step is done. Errors of the device surface here."""
        if self._buffer is not None:
            assert self._buffer.step is self, "a result is read before too many further steps are launched"
            self._buffer.done.synchronize()
            self._seconds = self._buffer.begun.elapsed_time(self._buffer.done) / 1e3
        log_probs = None if self._log_probs is None else self._log_probs.numpy().copy()
        return StepResult(self._tokens.numpy().copy(), log_probs, self._seconds)


class ResultRing:
    """Owns the buffers in which results come back, and uses them in turn. A step's is overwritten a few steps later."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        count = _RESULTS_IN_FLIGHT if device.type == "cuda" else 0
        self._buffers = [_ResultBuffer(num_rows) for _ in range(count)]
        self._turn = 0
        self._begun = 0.0

    def begin(self) -> None:
        """A step is launched from now on."""
        if self._buffers:
            self._turn = (self._turn + 1) % len(self._buffers)
            self._buffers[self._turn].begun.record()
        self._begun = time.perf_counter()

    def fetch(self, tokens: Tensor, log_probs: Tensor | None = None) -> PendingStep:
        """Starts the copy of its tokens [n] int32 and log probabilities [n] float32 to the host."""
        if not self._buffers:
            return PendingStep(tokens, log_probs, seconds=time.perf_counter() - self._begun)
        return PendingStep(tokens, log_probs, self._buffers[self._turn])


class ModelRunner:
    """Runs steps in the order in which they are launched; `launch` returns before a GPU has finished.

    overlap: how many steps may be in flight while the next is planned: 1 on a GPU, 0 where launching computes.
    """

    def __init__(
        self, model: CausalLM, storage: KVStorage, kernels: Kernels, num_rows: int, max_length: int,
        eos_ids: Sequence[int], device: torch.device,
    ) -> None:  # fmt: skip
        self.overlap = 1 if device.type == "cuda" else 0
        self._staging = Staging(device)
        self._results = ResultRing(num_rows, device)
        self._tables = RequestTables(num_rows, max_length, device)
        kv_layers = [KVLayer(*layer) for layer in storage.layers]
        self._step = Step(model, kernels, self._tables, kv_layers, self._staging)
        self.graphs: CudaGraphs | None = None  # without, all steps are launched kernel by kernel
        self._sampler = Sampler(kernels, num_rows, eos_ids)

    @property
    def table_bytes(self) -> int:
        """Of the request tables on the device."""
        return self._tables.tokens.nbytes + self._tables.slots.nbytes

    @torch.inference_mode()
    def capture_graphs(self, buckets: Sequence[Bucket]) -> None:
        """From now on a batch that one of these has room for is one launch."""
        self.graphs = CudaGraphs(self._step, buckets)

    @torch.inference_mode()
    def launch_padding(self, bucket: Bucket) -> None:
        """A step of this shape that belongs to no request."""
        self._step.run(EMPTY_BATCH, bucket)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        self._results.begin()
        if batch.admitted:
            new_rows = [admission.row for admission in batch.admitted]
            self._tables.admit(batch.admitted, self._staging)
            self._sampler.admit(new_rows, [admission.sampling for admission in batch.admitted])
        output = self.graphs.run(batch) if self.graphs else None
        logits, tokens, places = output or self._step.run(batch)
        rows = batch.rows[batch.samples]
        tokens = tokens[: len(rows)]
        if self._sampler.is_plain_greedy(rows):
            return self._results.fetch(tokens)
        lengths = (batch.starts + batch.lengths)[batch.samples]
        tokens, log_probs = self._sampler.sample(logits[: len(rows)], rows, lengths, self._tables, self._staging)
        self._tables.tokens.view(-1).index_copy_(0, places[: len(rows)], tokens)
        return self._results.fetch(tokens, log_probs)
