# SPDX-License-Identifier: Apache-2.0
"""ModelRunner: computes one Batch on one device. It decides nothing; the Router has decided."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.layers import CausalLM, KVLayer
from lightllm_backend.router.batch import Batch, StepResult
from lightllm_backend.runner.cuda_graphs import DecodeGraphs
from lightllm_backend.runner.device_batch import DeviceBatch, RequestTables
from lightllm_backend.runner.sampler import Sampler


class PendingStep:
    """A step that the device may still be computing."""

    def __init__(self, tokens: Tensor, log_probs: Tensor | None) -> None:
        self._tokens, self._log_probs = _to_host(tokens), None if log_probs is None else _to_host(log_probs)
        self._done = torch.cuda.Event() if tokens.is_cuda else None  # type: ignore[no-untyped-call]
        if self._done:
            self._done.record()

    def result(self) -> StepResult:
        """Blocks until the step is done. Errors of the device surface here."""
        if self._done:
            self._done.synchronize()
        return StepResult(self._tokens.numpy(), None if self._log_probs is None else self._log_probs.numpy())


class ModelRunner:
    """Runs steps in the order in which they are launched; `launch` returns before a GPU has finished.

    overlap: how many steps may be in flight while the next is planned: 1 on a GPU, 0 where launching computes.
    """

    def __init__(
        self, model: CausalLM, storage: KVStorage, kernels: ModuleType, num_rows: int, max_length: int,
        eos_ids: Sequence[int], device: torch.device,
    ) -> None:  # fmt: skip
        self.overlap = 1 if device.type == "cuda" else 0
        self._model = model
        self._kv_layers = [KVLayer(*layer) for layer in storage.layers]
        self._tables = RequestTables(num_rows, max_length, device)
        self._graphs: DecodeGraphs | None = None
        self._sampler = Sampler(kernels, num_rows, eos_ids, device)

    @torch.inference_mode()
    def capture_graphs(self, batch_sizes: Sequence[int]) -> None:
        """From now on a batch of decodes alone, up to the largest of these sizes, is one launch."""
        self._graphs = DecodeGraphs(self._model, self._tables, self._kv_layers, batch_sizes)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        if batch.admitted:
            rows = [admission.row for admission in batch.admitted]
            self._tables.admit(rows, [admission.prompt_ids for admission in batch.admitted])
            self._sampler.admit(rows, [admission.sampling for admission in batch.admitted])
        if self._graphs and self._graphs.covers(batch):
            logits, greedy_tokens, sampled = self._graphs.run(batch)
            if self._sampler.is_plain_greedy(sampled.host_rows):
                return PendingStep(greedy_tokens, None)
        else:
            device_batch = DeviceBatch(batch, self._tables, self._kv_layers)
            logits, sampled = self._model.forward(device_batch.step), device_batch.sampled
        tokens, log_probs = self._sampler.sample(logits, sampled, self._tables)
        self._tables.tokens[sampled.rows, sampled.lengths] = tokens
        return PendingStep(tokens, log_probs)


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
