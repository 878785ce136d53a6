# SPDX-License-Identifier: Apache-2.0
"""Whole decode steps as CUDA graphs, by batch size: to launch their kernels one by one takes longer than they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lightllm_backend.models.layers import CausalLM, KVLayer, StepInput
from lightllm_backend.router.batch import Batch
from lightllm_backend.runner.device_batch import RequestTables, Sampled, upload


def batch_size_buckets(largest: int) -> list[int]:
    """The batch sizes that are captured: close together where steps are short, at most an eighth apart beyond 64."""
    buckets = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64]
    while buckets[-1] < largest:
        buckets.append(buckets[-1] + max(8, buckets[-1] // 8 // 8 * 8))
    return [size for size in buckets if size < largest] + [largest]


@dataclass(frozen=True)
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor  # [4, size] int32: rows, positions, slots, rotary lengths; what a replay reads
    last_tokens: Tensor  # [size]; read as well, so it must live as long
    logits: Tensor  # [size, vocab] float32
    tokens: Tensor  # [size] int32, the greedy choice


class DecodeGraphs:
    """Owns one graph for each bucket of batch sizes; all of them use the same memory, since only one runs at a time.

    A replay reads the tables of the requests, runs the model, and writes the greedy choice into the table of tokens. A
    batch that is smaller than its bucket is padded with the tables' padding row, whose slot is -1: it writes nowhere
    else and its context is empty.
    """

    def __init__(
        self, model: CausalLM, tables: RequestTables, kv_layers: Sequence[KVLayer], buckets: Sequence[int]
    ) -> None:
        self._model = model
        self._tables = tables
        self._kv_layers = kv_layers
        self._captures: dict[int, _Capture] = {}
        self._buckets = np.array(sorted(buckets))
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others find all the memory that they need.
        for size in tqdm(sorted(buckets, reverse=True), desc="Capturing CUDA graphs", unit="graph"):
            self._captures[size] = self._capture(size, pool)

    def covers(self, batch: Batch) -> bool:
        return batch.num_decodes == len(batch.rows) <= int(self._buckets[-1])

    def run(self, batch: Batch) -> tuple[Tensor, Tensor, Sampled]:
        """Logits [n, vocab], which may be changed, greedy tokens [n], and whose they are. Valid until the next run."""
        count = len(batch.rows)
        size = int(self._buckets[np.searchsorted(self._buckets, count)])
        capture = self._captures[size]
        positions = batch.starts
        arrays = np.zeros((4, size), dtype=np.int32)
        arrays[0, count:], arrays[2, count:] = self._tables.padding_row, -1
        arrays[:, :count] = (
            batch.rows,
            positions,
            batch.slots,
            np.maximum(self._tables.prompt_lengths[batch.rows], positions + 1),
        )
        (packed,) = upload([arrays.reshape(-1)], self._tables.device)
        capture.inputs.view(-1).copy_(packed)
        capture.graph.replay()
        sampled = Sampled(batch.rows, positions + 1, capture.inputs[0, :count], capture.inputs[1, :count] + 1)
        return capture.logits[:count], capture.tokens[:count], sampled

    def _capture(self, size: int, pool: Any) -> _Capture:
        inputs = torch.zeros((4, size), dtype=torch.int32, device=self._tables.device)
        inputs[0], inputs[2] = self._tables.padding_row, -1
        last_tokens = torch.arange(size, device=self._tables.device)
        self._step(inputs, last_tokens)  # compiles what this size needs, which a capture may not
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits, tokens = self._step(inputs, last_tokens)
        return _Capture(graph, inputs, last_tokens, logits, tokens)

    def _step(self, inputs: Tensor, last_tokens: Tensor) -> tuple[Tensor, Tensor]:
        rows, positions, slots, rotary_lengths = inputs.unbind()
        tables = self._tables
        tables.slots[rows, positions] = slots
        step = StepInput(
            input_ids=tables.tokens[rows, positions],
            positions=positions,
            rotary_lengths=rotary_lengths,
            slots=slots,
            rows=rows,
            # A padding row has no context.
            context_lengths=torch.where(slots >= 0, positions + 1, 0).int(),
            query_starts=last_tokens[:1].int(),
            num_decodes=len(rows),
            max_query_length=0,
            max_context_length=tables.tokens.shape[1],
            last_tokens=last_tokens,
            req_to_token=tables.slots,
            kv_layers=self._kv_layers,
        )
        logits = self._model.forward(step)
        tokens = logits.argmax(-1).int()
        tables.tokens[rows, positions + 1] = tokens
        return logits, tokens
