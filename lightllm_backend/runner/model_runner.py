# SPDX-License-Identifier: Apache-2.0
"""ModelRunner: computes batches on one device. It makes no decisions; the Router has made them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllm_backend.kernels.interface import Kernels
from lightllm_backend.kv_pool.layer_groups import LayerGroups
from lightllm_backend.kv_pool.storage import KVStorage
from lightllm_backend.models.causal_lm import CausalLM
from lightllm_backend.models.layers import KVLayer
from lightllm_backend.request import MAX_TOP_LOG_PROBS, TOP_LOG_PROB
from lightllm_backend.router.batch import Batch, StepResult, TopLogProbs
from lightllm_backend.runner.cuda_graphs import CudaGraphs
from lightllm_backend.runner.device_tables import DeviceTables
from lightllm_backend.runner.prompt_scores import DeviceScores
from lightllm_backend.runner.sampler import Sampled, Sampler, Top
from lightllm_backend.runner.staging import Staging
from lightllm_backend.runner.step import Step
from lightllm_backend.runner.step_arrays import EMPTY_BATCH, Bucket
from lightllm_backend.runner.token_masks import TokenMasks

# Results that may be unread at once; the worker has at most `overlap` + 1 = 2 steps in flight.
_RESULTS_IN_FLIGHT = 4


class _ResultBuffer:
    """Pinned memory for what one step samples, with events for its begin and its end."""

    def __init__(self, num_rows: int) -> None:
        self.token_ids = torch.empty(num_rows, dtype=torch.int32, pin_memory=True)
        self.log_probs = torch.empty(num_rows, dtype=torch.float32, pin_memory=True)
        most = num_rows * MAX_TOP_LOG_PROBS
        self.top_token_ids = torch.empty(most, dtype=torch.int32, pin_memory=True)
        self.top_log_probs = torch.empty(most, dtype=torch.float32, pin_memory=True)
        self.begun, self.done = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.step: PendingStep | None = None  # the step that fills the buffer

    def fetch(self, sampled: Sampled) -> Sampled:
        """Start the copy into the buffer."""
        token_ids, log_probs, top = sampled
        return Sampled(
            _copy(token_ids, self.token_ids),
            None if log_probs is None else _copy(log_probs, self.log_probs),
            top
            and Top(top.samples, _copy(top.token_ids, self.top_token_ids), _copy(top.log_probs, self.top_log_probs)),
        )


def _copy(source: Tensor, memory: Tensor) -> Tensor:
    """Start the copy of a tensor to the beginning of flat memory."""
    return memory[: source.numel()].view(source.shape).copy_(source, non_blocking=True)


class PendingStep:
    """A launched step, whose result the device may still be computing. On a CPU, it is done and took `seconds`.

    masks: [structured rows, words] int32, to be written before `ModelRunner.release`; None: the step has all it needs.
    """

    def __init__(self, buffer: _ResultBuffer | None, begun: float, masks: NDArray[np.int32] | None = None) -> None:
        self.masks = masks
        self.gate_number = 0  # what opens the gate that the step waits at
        self._buffer, self._begun = buffer, begun
        self._seconds = self._launch_seconds = 0.0
        self._sampled: Sampled | None = None
        self._scores: DeviceScores | None = None
        if buffer is not None:
            buffer.step = self

    def fetch(self, sampled: Sampled, scores: DeviceScores | None) -> PendingStep:
        """Start the copy of what the step has sampled, and of its scores, to the host."""
        self._scores = scores and scores.to_host()
        if self._buffer is not None:
            sampled = self._buffer.fetch(sampled)
            self._buffer.done.record()
            self._launch_seconds = time.perf_counter() - self._begun
        else:
            self._seconds = time.perf_counter() - self._begun
        self._sampled = sampled
        return self

    def is_done(self) -> bool:
        """Whether `result` would return at once."""
        return self._buffer is None or self._buffer.done.query()  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """Wait until the step is done and return its tokens. Errors of the device surface here."""
        assert self._sampled is not None, "the step has sampled"
        if self._buffer is not None:
            assert self._buffer.step is self, "a result is read before too many further steps are launched"
            self._buffer.done.synchronize()
            self._seconds = self._buffer.begun.elapsed_time(self._buffer.done) / 1e3
        token_ids, log_probs, top = self._sampled
        return StepResult(
            token_ids.numpy().copy(),
            None if log_probs is None else log_probs.numpy().copy(),
            self._seconds,
            self._scores.split() if self._scores else (),
            None if top is None else TopLogProbs(top.samples, _pairs(top)),
            self._launch_seconds,
        )


def _pairs(top: Top) -> NDArray[Any]:
    """Copy the likeliest tokens [a, k] into an array of TOP_LOG_PROB."""
    pairs = np.empty(tuple(top.token_ids.shape), dtype=TOP_LOG_PROB)
    pairs["token_id"], pairs["log_prob"] = top.token_ids.numpy(), top.log_probs.numpy()
    return pairs


class ResultRing:
    """A ring of buffers that results are copied to. A step overwrites the result of four steps before."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        count = _RESULTS_IN_FLIGHT if device.type == "cuda" else 0
        self._buffers = [_ResultBuffer(num_rows) for _ in range(count)]
        self._turn = 0
        self._begun = 0.0

    def begin(self) -> None:
        """Mark the begin of a step."""
        if self._buffers:
            self._turn = (self._turn + 1) % len(self._buffers)
            self._buffers[self._turn].begun.record()
        self._begun = time.perf_counter()

    def step(self, masks: NDArray[np.int32] | None = None) -> PendingStep:
        """Return the step that has begun; see PendingStep."""
        return PendingStep(self._buffers[self._turn] if self._buffers else None, self._begun, masks)


class _Unsampled(NamedTuple):
    """What sampling needs of a step whose forward is launched."""

    logits: Tensor  # [m, vocab]
    indices: Tensor  # [m] int64, the places of the tokens in the flattened table
    rows: NDArray[np.int32]  # [m]
    lengths: NDArray[np.int32]  # [m] tokens before the sampled one
    scores: DeviceScores | None


class ModelRunner:
    """Runs steps in the order of their launches. On a GPU, `launch` returns before the step is done.

    overlap: the steps that may be in flight while the next is planned: 1 on a GPU, 0 on a CPU, where `launch` computes.
    """

    def __init__(
        self,
        model: CausalLM,
        storage: KVStorage,
        kernels: Kernels,
        num_rows: int,
        max_length: int,
        eos_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        groups: LayerGroups | None = None,
        with_gate: bool = True,
    ) -> None:
        """groups: of the storage's layers and the model's; by default, each layer of the model has its own.

        with_gate: launch steps before their masks are made, where the driver can. Not for one of several ranks: its
        thread both launches steps and opens the gate, and a launch that waits for the device would wait for itself.
        """
        groups = groups or LayerGroups.whole(len(storage.layers))
        self.overlap = 1 if device.type == "cuda" else 0
        self._staging = Staging(device)
        self._results = ResultRing(num_rows, device)
        self._tables = DeviceTables(num_rows, max_length, device, groups.count)
        kv_layers = [KVLayer(*storage.layers[place], group=group) for group, place in groups.places]
        self._step = Step(model, kernels, self._tables, kv_layers, self._staging)
        self.graphs: CudaGraphs | None = None  # None: every step launches kernel by kernel
        self._kernels = kernels
        self._sampler = Sampler(kernels, num_rows, eos_ids, device)
        self._masks = TokenMasks(num_rows, vocab_size, device, with_gate)
        self._unsampled: _Unsampled | None = None  # of the step last launched, if it waits for its masks

    @property
    def table_bytes(self) -> int:
        """The bytes of the tables on the device."""
        return self._tables.token_ids.nbytes + self._tables.slots.nbytes

    @torch.inference_mode()
    def capture_graphs(self, buckets: Sequence[Bucket]) -> None:
        """Capture these buckets. From then on, a batch that fits one of them takes one launch."""
        self.graphs = CudaGraphs(self._step, buckets)

    @torch.inference_mode()
    def launch_padding(self, bucket: Bucket) -> None:
        """Launch a step of this shape that holds nothing but padding."""
        self._step.run(EMPTY_BATCH, bucket)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Upload and launch a step: its admissions, the model and the sampler.

        A step with `masks` samples only after `release`.
        """
        self._results.begin()
        if batch.admitted:
            new_rows = [admission.row for admission in batch.admitted]
            params = [admission.sampling for admission in batch.admitted]
            self._tables.admit(batch.admitted, self._staging)
            self._sampler.admit(new_rows, params, self._staging)
            self._masks.admit(new_rows, params)
        output = self.graphs.run(batch) if self.graphs and not batch.scored else None
        logits, token_ids, indices, scores = output or self._step.run(batch)
        rows = batch.rows[batch.samples]
        if self._sampler.is_plain_greedy(rows):
            return self._results.step().fetch(Sampled(token_ids[: len(rows)]), scores)
        lengths = (batch.starts + batch.lengths)[batch.samples]
        self._unsampled = _Unsampled(logits[: len(rows)], indices[: len(rows)], rows, lengths, scores)
        masks = self._masks.take(rows)
        step = self._results.step(masks if len(masks) else None)
        return self._sample(step) if step.masks is None or self.is_gated else step

    @property
    def is_gated(self) -> bool:
        """Whether whole steps are launched before their masks are made; then any thread may `release` them."""
        return self._masks.gate is not None

    def release(self, step: PendingStep) -> None:
        """Let a step sample whose masks are written. Steps are released in order."""
        if self._masks.gate is not None:
            self._masks.gate.open(step.gate_number)
        else:
            self._sample(step)

    def release_all(self) -> None:
        """Let the device run what is launched to its end, with whatever masks; nobody takes the results."""
        if self._masks.gate is not None:
            self._masks.gate.open_all()

    @torch.inference_mode()
    def _sample(self, step: PendingStep) -> PendingStep:
        """Launch the sampler of the step last launched."""
        assert self._unsampled is not None, "the step waits"
        (logits, indices, rows, lengths, scores), self._unsampled = self._unsampled, None
        all_token_ids = self._tables.token_ids.view(-1)
        with self._masks.on_device(self.is_gated and step.masks is not None) as masks:
            step.gate_number = self._masks.gate_number
            if masks is not None and self._sampler.is_greedy(rows):
                token_ids = self._kernels.choose_greedily(logits, indices, all_token_ids, *masks)
                return step.fetch(Sampled(token_ids), scores)
            sampled = self._sampler.sample(logits, rows, lengths, self._tables, self._staging, indices, masks)
        return step.fetch(sampled, scores)
